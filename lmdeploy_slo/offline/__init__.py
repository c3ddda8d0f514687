"""Away from the server: recorded traces, their replay, the simulator, result files and reports."""
