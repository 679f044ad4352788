"""The command in processes of its own that start in moments: forked from one that has imported the libraries, and has
computed nothing."""

import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LIBRARIES = [
    "diffusers.pipelines.flux.pipeline_flux",
    "diffusers.models.autoencoders.autoencoder_tiny",
    "transformers.models.clip.modeling_clip",
    "transformers.models.t5.modeling_t5",
    "rolling_diffusion.loading",
    "rolling_diffusion.pipeline",
    "rolling_diffusion.cli.growing",
    "own_stream",
]


def command(argv: list[str], folder: str) -> None:
    """What `rolling-diffusion` does in a folder; its words go to a file there."""
    import torch

    from rolling_diffusion.cli import main

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background of a shell ignores it
    os.chdir(folder)
    with open("words.txt", "a") as words:
        sys.stdout = sys.stderr = words
        code = main(argv)
    sys.exit(code)


def start(argv: list[str], folder: Path) -> Any:
    """A process that runs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    process = context.Process(target=command, args=(list(argv), str(folder)))
    process.start()
    return process
