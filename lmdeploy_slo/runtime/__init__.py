"""The asyncio driver of the scheduler: planner worker, dispatch, token streams, and how every request ends."""
