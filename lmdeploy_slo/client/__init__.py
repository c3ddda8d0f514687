"""The client library: `Client` for threads, `AsyncClient` for an event loop.

It knows the wire protocol and the package's exceptions, and nothing of the server: importing it is light.
"""

from __future__ import annotations

from lmdeploy_slo.client.asynchronous import AsyncClient, AsyncStream
from lmdeploy_slo.client.blocking import Client, Stream
from lmdeploy_slo.client.channel import tls_credentials
from lmdeploy_slo.client.errors import ClientError, ServerUnreachable
from lmdeploy_slo.client.explanation import (
    Explanation,
    QueuePlace,
    RequestState,
    SentBefore,
    SentRequest,
    WaitTime,
)
from lmdeploy_slo.client.request import ChatMessage, GenerateOptions, Prompt
from lmdeploy_slo.client.results import (
    Completion,
    Forecast,
    Generation,
    Interval,
    Load,
    ModelInfo,
    Objectives,
    PlanQuality,
    Prediction,
    ReplicaLoad,
    Scaled,
    ServerInfo,
    StepForecasts,
    StreamChunk,
    TaskLoad,
    Timing,
    TokenLogprob,
    Usage,
)
from lmdeploy_slo.client.retry import NO_RETRY, RetryPolicy
from lmdeploy_slo.core.request import FinishReason, PriorityClass

__all__ = [
    "AsyncClient",
    "AsyncStream",
    "ChatMessage",
    "Client",
    "ClientError",
    "Completion",
    "Explanation",
    "FinishReason",
    "Forecast",
    "GenerateOptions",
    "Generation",
    "Interval",
    "Load",
    "ModelInfo",
    "NO_RETRY",
    "Objectives",
    "PlanQuality",
    "Prediction",
    "ReplicaLoad",
    "Scaled",
    "PriorityClass",
    "Prompt",
    "QueuePlace",
    "RequestState",
    "RetryPolicy",
    "SentBefore",
    "SentRequest",
    "ServerInfo",
    "ServerUnreachable",
    "Stream",
    "StepForecasts",
    "StreamChunk",
    "TaskLoad",
    "Timing",
    "TokenLogprob",
    "Usage",
    "tls_credentials",
    "WaitTime",
]
