"""Pure data and formulas: no asyncio, no grpc, no numba, no clock."""
