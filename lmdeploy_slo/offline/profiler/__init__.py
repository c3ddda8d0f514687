"""The profiler: measures a running engine on a grid of batches, prompts and contexts and fits both latency models.

    grid -> warm up -> (measure a point -> keep what was measured)* -> fit -> profile file, page

`target` is what it talks to: a gateway over gRPC, or an engine in its own process.
"""
