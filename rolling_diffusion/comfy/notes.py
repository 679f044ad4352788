"""What a run tells its user: in the log, and on the node that runs, where the page shows texts on nodes."""

from __future__ import annotations

import logging
import sys

from comfy_execution.utils import get_executing_context

log = logging.getLogger("rolling_diffusion")


class Notes:
    """The sentences of one run, each told once."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def tell(self, sentence: str, level: int = logging.INFO) -> None:
        if sentence in self.told:
            return
        self.told.append(sentence)
        log.log(level, "Rolling: %s", sentence)
        running = get_executing_context()
        server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
        if running is not None and server is not None:  # neither is there in a script that uses ComfyUI's modules
            server.send_progress_text("\n".join(self.told), running.node_id)

    def warn(self, sentence: str) -> None:
        self.tell(sentence, logging.WARNING)
