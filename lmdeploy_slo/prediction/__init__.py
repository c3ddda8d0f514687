"""Forecasts: how long an output will be, how long the engine will take, and the files such knowledge is kept in."""
