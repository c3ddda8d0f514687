"""LMDeploy's own interfaces with the scheduler in them: its Pipeline and its OpenAI routes over `ScheduledEngine`."""
