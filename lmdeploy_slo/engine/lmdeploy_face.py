"""What a gateway must know of an LMDeploy engine that runs elsewhere: its tokenizer, its chat template, what it takes.

Needs LMDeploy and the model's configuration and tokenizer files, no GPU and no weights.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

from lmdeploy_slo.engine import lmdeploy_request
from lmdeploy_slo.engine.base import EngineInfo, EngineRequest
from lmdeploy_slo.engine.lmdeploy_options import Device, LmdeployOptions, import_lmdeploy
from lmdeploy_slo.engine.lmdeploy_tokenizer import LmdeployTokenizer
from lmdeploy_slo.errors import EngineUnavailable

_loading = threading.Lock()


class LmdeployFace:
    """See `engine.remote.Face`. Faces of one model share what is read of it."""

    def __init__(self, options: LmdeployOptions) -> None:
        self._options = options
        self._tokenizer: LmdeployTokenizer | None = None

    @property
    def info(self) -> EngineInfo:
        options = self._options
        return EngineInfo(
            name="lmdeploy",
            model=options.model,
            synthetic=False,
            limits=options.limits,
            max_session_tokens=options.max_session_tokens,
            vocab_size=None,
            look_ahead=options.effective_look_ahead,
        )

    @property
    def tokenizer(self) -> LmdeployTokenizer:
        if self._tokenizer is None:
            raise EngineUnavailable("the model's tokenizer is not loaded yet")
        return self._tokenizer

    def load(self) -> None:
        """Raises EngineUnavailable for a model whose tokenizer cannot be read."""
        options = self._options
        with _loading:  # replicas start side by side, and the import is to be patched once
            import_lmdeploy(device=Device.CUDA, patched=options.patched)  # what runs it is another process's business
            try:
                self._tokenizer = _read(
                    options.model,
                    options.turbomind.get("download_dir"),
                    options.turbomind.get("revision"),
                    options.chat_template,
                    options.trust_remote_code,
                )
            except Exception as error:  # a tokenizer can fail in any way
                raise EngineUnavailable(f"the tokenizer of {options.model} cannot be read: {error}") from error

    def unsupported_fields(self, request: EngineRequest, info: EngineInfo) -> Sequence[tuple[str, str]]:
        return lmdeploy_request.wrong_fields(request, info)


@functools.lru_cache(maxsize=8)
def _read(
    model: str, download_dir: str | None, revision: str | None, chat_template: str | None, trust_remote_code: bool
) -> LmdeployTokenizer:
    """As LMDeploy's AsyncEngine does it."""
    from lmdeploy.model import ChatTemplateConfig, get_chat_template
    from lmdeploy.tokenizer import Tokenizer
    from lmdeploy.utils import get_model

    if (download_dir or revision) and not Path(model).exists():
        model = get_model(model, download_dir, revision)
    template = ChatTemplateConfig(chat_template) if chat_template else None
    parts = SimpleNamespace(
        tokenizer=Tokenizer(model, trust_remote_code=trust_remote_code),
        chat_template=get_chat_template(model, template, trust_remote_code=trust_remote_code),
    )
    return LmdeployTokenizer(parts)
