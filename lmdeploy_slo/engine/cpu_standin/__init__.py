"""A stand-in for TurboMind's native module that computes on the CPU with transformers.

It takes the place of `lmdeploy.turbomind._turbomind`, so that everything of LMDeploy above it runs as it is: tokenizer,
chat template, sessions, handles, streaming, detokenizer, metrics, HTTP server. Tokens are real tokens of the
checkpoint's weights; the time a step takes is that of this machine's CPU and says nothing about a GPU.

    native    the types and functions LMDeploy calls, and how they are put in place
    batch     the persistent batch and its worker thread
    rows      KV cache of the batch, one row per sequence; the forward pass
    sampling  from logits to a token
    prefix    reuse of KV blocks between prompts
"""
