"""`python -m harness.demo`: a real ComfyUI with this pack draws one prompt with LoRA A, LoRA B, A + B and none.

It queues the bundled workflows of Pocket FLUX and Pocket FLUX.2 with other LoRAs each time (`adapt`), saves the images
and a contact sheet, and prints one table. It fails if a prompt fails or a LoRA made anything recompile.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from harness.client import Client
from harness.comfyui import FetchError
from harness.demo_report import DemoFailed, DemoPrompt, Row, contact_sheet, read_report, readable, table
from harness.graphs import Graph
from harness.paths import CACHE, REPO
from harness.prompt_result import ComfyError, Event, PromptResult
from harness.server import ComfyServer, ServerFailed

WORKFLOWS = REPO / "example_workflows" / "api"
OUTLINE = "pocket-outline-kohya.safetensors"
NEON = "pocket-neon-diffusers.safetensors"
STRIPES = "pocket-stripes-comfyui.safetensors"
FLUX2_NEON = "pocket-flux2-neon-diffusers.safetensors"
FLUX2_OUTLINE = "pocket-flux2-outline-comfyui.safetensors"
SEED = 2
# The workflow draws a picture, then takes it as a reference.
FLUX2: dict[str, Any] = {"workflow": "flux_hotswap_pocket_flux2", "samplings": 2}
TITLES = {"flux_hotswap_pocket": "Pocket FLUX", "flux_hotswap_pocket_flux2": "Pocket FLUX.2"}

# Nodes that have one -> the input.
SEEDS = {"KSampler": "seed", "RandomNoise": "noise_seed"}

Say = Callable[[str], None]

PROMPTS = (
    DemoPrompt("A: neon", ((NEON, 1.0),), "1_neon.png"),
    DemoPrompt("B: stripes", ((STRIPES, 1.0),), "2_stripes.png"),
    DemoPrompt("A + B", ((NEON, 1.0), (STRIPES, 1.0)), "3_neon_and_stripes.png"),
    DemoPrompt("none", (), "4_none.png"),
    DemoPrompt("C: outline", ((OUTLINE, 1.0),), "5_outline.png"),
    DemoPrompt("B at half strength", ((STRIPES, 0.5),), "6_half_stripes.png"),
    DemoPrompt("A + C", ((NEON, 1.0), (OUTLINE, 1.0)), "7_neon_and_outline.png"),
    DemoPrompt("none again", (), "8_none_again.png"),
    # Not the same graph twice in a row, in the next round either: ComfyUI would run nothing of it.
    DemoPrompt("FLUX.2, D: neon", ((FLUX2_NEON, 1.0),), "9_flux2_neon.png", **FLUX2),
    DemoPrompt("FLUX.2, none", (), "10_flux2_none.png", **FLUX2),
    DemoPrompt("FLUX.2, E: outline", ((FLUX2_OUTLINE, 1.0),), "11_flux2_outline.png", **FLUX2),
    DemoPrompt("FLUX.2, none, edited", (), "12_flux2_edited.png", **FLUX2, shown=1),
)
CONTACT_SHEET = "contact_sheet.png"
BASE = CACHE / "demo"
"""ComfyUI's folders, and the server's log."""
KERNELS = CACHE / "inductor"

_EXPLANATION = """\
The first prompt of a model also loads and compiles it; a second run takes kernels from the cache.
swap ms is all that a change of LoRAs costs: cold prepares a stack for the first time, hot finds it in memory (see it
with `--rounds 2`)."""


def adapt(graph: Mapping[str, Any], loras: Sequence[tuple[str, float]]) -> Graph:
    """Put other LoRAs into the bundled workflow, as a user does: everything else stays.

    The seed is `SEED`. Files and strengths of the Hotswap LoRA nodes change, in the order of the chain. Nodes left over
    are bypassed as Ctrl+B in the frontend does: what used their MODEL or CLIP gets their `model` or `clip`.

    Args:
        graph: the workflow in API format; not changed.
        loras: (file, strength), first applied first.
    Raises:
        ValueError: more LoRAs than nodes.
    """
    adapted = copy.deepcopy(dict(graph))
    for entry in adapted.values():
        if entry["class_type"] in SEEDS:
            entry["inputs"][SEEDS[entry["class_type"]]] = SEED
    chain = _lora_chain(adapted)
    if len(loras) > len(chain):
        raise ValueError(f"{len(loras)} LoRAs, but the workflow has {len(chain)} Hotswap LoRA nodes.")
    for node_id, (file, strength) in zip(chain, loras, strict=False):
        adapted[node_id]["inputs"].update(lora_name=file, strength=strength)
    for node_id in reversed(chain[len(loras) :]):
        _bypass(adapted, node_id)
    return adapted


def _lora_chain(graph: Graph) -> list[str]:
    """Ids of the Hotswap LoRA nodes, the one next to the loader first."""
    chain: list[str] = []
    (source,) = (key for key, entry in graph.items() if entry["class_type"] == "FluxAccelLoader")
    while source is not None:
        source = next(
            (
                key
                for key, entry in graph.items()
                if entry["class_type"] == "FluxHotswapLora" and entry["inputs"]["model"][0] == source
            ),
            None,
        )
        if source is not None:
            chain.append(source)
    return chain


def _bypass(graph: Graph, node_id: str) -> None:
    removed = graph.pop(node_id)["inputs"]
    instead = {0: removed["model"], 1: removed.get("clip")}
    for entry in graph.values():
        for name, value in entry["inputs"].items():
            if isinstance(value, list) and value[0] == node_id:
                entry["inputs"][name] = instead[value[1]]


def run(output: Path, say: Say, rounds: int = 1) -> list[Row]:
    """Queue every prompt, save the images and the contact sheet.

    Args:
        output: folder of the images, made if missing. Those of an earlier run are replaced one by one.
        say: called with each line of progress.
        rounds: how often to queue all prompts; from the second time on, images are named `round2_…`.

    Returns:
        One row per queued prompt, in order.

    Raises:
        ComfyError: a prompt was rejected, failed, or the server ended.
        DemoFailed: see `read_report`.
        FetchError: there is no ComfyUI.
        OSError: the cache or `output` cannot be written.
        ServerFailed: ComfyUI did not start.
    """
    output.mkdir(parents=True, exist_ok=True)
    workflows = {name: json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8")) for name in TITLES}
    models = " and ".join(TITLES.values())
    say(f"Models: {models}, which come with the pack: {readable(REPO / 'pocket' / 'models')}")
    shutil.rmtree(BASE / "output", ignore_errors=True)  # ComfyUI's own copies; ours go to `output`
    state = "some from earlier runs" if KERNELS.is_dir() else "none yet, the first prompt will take a minute"
    say(f"Compiled kernels in {readable(KERNELS)}: {state}")
    say("Starting ComfyUI with this pack")
    # --cache-classic: nodes run again unless the prompt before was the same, so a second round samples too.
    with ComfyServer(BASE, comfy_args=["--cache-classic"], env={"TORCHINDUCTOR_CACHE_DIR": str(KERNELS)}) as server:
        say(f"  ComfyUI {server.version} runs on {server.url}; its log: {readable(BASE / 'comfyui.log')}")
        with server.client() as client:
            rows = [
                _draw(server, client, workflows[prompt.workflow], prompt, output, prefix, say)
                for name in TITLES  # one model after the other: the pack keeps one engine
                for prefix in ["", *(f"round{number}_" for number in range(2, rounds + 1))]
                for prompt in PROMPTS
                if prompt.workflow == name
            ]
    first = {row.prompt.name: row for row in reversed(rows)}
    sections = [
        (f"{title}: {_texts(workflows[name])}, seed {SEED}, 96 x 96 pixels, enlarged",
         [first[prompt.name] for prompt in PROMPTS if prompt.workflow == name])
        for name, title in TITLES.items()
    ]  # fmt: skip
    _save(contact_sheet(sections), output / CONTACT_SHEET)
    return rows


def _texts(workflow: Graph) -> str:
    """The prompts in a workflow, as a caption."""
    texts = [entry["inputs"]["text"] for entry in workflow.values() if entry["class_type"] == "CLIPTextEncode"]
    return ", then ".join(f"“{text}”" for text in texts)


def _draw(
    server: ComfyServer, client: Client, workflow: Graph, prompt: DemoPrompt, output: Path, prefix: str, say: Say
) -> Row:
    say(f"Queueing '{prompt.name}': {prompt.lora_text}")
    mark = server.mark()
    result = client.run(adapt(workflow, prompt.loras), on_event=_narrate(say), check=True)
    report = read_report(server.log_since(mark), prompt.samplings)
    image = _image(client, result, prompt.shown)
    path = output / (prefix + prompt.file_name)
    _save(image, path)
    return Row(prompt, result.seconds, report, path)


def _narrate(say: Say) -> Callable[[Event], None]:
    """Repeat what the nodes show below themselves, except the summary that ends up in the table."""

    def on_event(event: Event) -> None:
        if event.type == "progress_text" and not event.data["text"].startswith("LoRAs "):
            say(f"  {event.data['text']}")

    return on_event


def _image(client: Client, result: PromptResult, number: int) -> Image.Image:
    """One of the pictures of a prompt, in the order of the nodes that save them."""
    by_node = sorted(result.outputs.items(), key=lambda output: int(output[0]))
    images = [image for _, shown in by_node for image in shown.get("images", ())]
    if len(images) <= number:
        raise DemoFailed(
            f"Prompt {result.prompt_id} succeeded but gave {len(images)} images, expected {number + 1}; its outputs "
            f"are {result.outputs}."
        )
    return Image.open(io.BytesIO(client.view(**images[number]))).convert("RGB")


def _save(image: Image.Image, path: Path) -> None:
    """Write a PNG whole or not at all, so that an interrupted run leaves no half image."""
    partial = path.with_suffix(".partial")
    image.save(partial, format="PNG")
    os.replace(partial, path)


def check_recompiles(rows: Sequence[Row]) -> None:
    """Raise `DemoFailed` where a prompt made the model recompile."""
    recompiled = [f"'{row.prompt.name}': {row.report.recompiles}" for row in rows if row.report.recompiles]
    if recompiled:
        raise DemoFailed(f"Prompts made the model recompile ({', '.join(recompiled)}), expected 0 for all.")


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m harness.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=REPO / "demo-output", help="folder of the images")
    parser.add_argument("--rounds", type=int, default=1, help="how often to queue all prompts (default 1)")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}, expected 1 or more")
    try:
        rows = run(options.output, lambda line: print(f"[demo] {line}", flush=True), options.rounds)
        print(f"\n{table(rows)}\n\n{_EXPLANATION}")
        print(f"Contact sheet: {readable(options.output / CONTACT_SHEET)}", flush=True)
        check_recompiles(rows)
    except (DemoFailed, ComfyError) as error:
        print(f"error: {error}\nThe server's whole log: {BASE / 'comfyui.log'}", file=sys.stderr)
        return 1
    except (FetchError, OSError, ServerFailed) as error:  # OSError: folders, and the time-out of a prompt
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted; the server was ended. Run the same command again.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
