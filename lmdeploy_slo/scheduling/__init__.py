"""The synchronous decision core. It knows no engine, no event loop and no clock; asyncio and the simulator drive it."""
