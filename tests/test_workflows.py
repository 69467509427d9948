"""The bundled workflows, help pages and translations in ComfyUI's own frontend, driven through a real Chromium."""

import contextlib
import io
import json
import os
import re
import urllib.error

import pytest
import torch
from PIL import Image
from playwright.sync_api import expect, sync_playwright

from harness.client import http_request
from harness.paths import REPO, require_chromium
from harness.prompt_result import PromptLost
from harness.server import PACK_NAME, ComfyServer
from harness.tensor_files import write_tensors

# Not `workflows`: ComfyUI takes `examples`, which holds programs, for a folder of templates too, and looks there first.
WORKFLOWS = REPO / "example_workflows"
NAMES = (
    "flux_hotswap_text_to_image",
    "flux_hotswap_two_loras",
    "flux_hotswap_pocket",
    "flux_hotswap_low_vram",
    "flux_hotswap_flux2_two_loras",
    "flux_hotswap_flux2_edit",
    "flux_hotswap_flux2_low_vram",
)
NODES = {
    "FluxAccelLoader": "Accelerated Flux Loader",
    "FluxQuantizeTransformer": "Quantize Transformer",
    "FluxOffloadConfig": "Offload Config",
    "FluxHotswapLora": "Hotswap LoRA",
    "FluxTextEncoderLoader": "Flux Text Encoder Loader",
    "FluxTinyVaeLoader": "Flux Tiny VAE Loader",
    "FluxStepCache": "Flux Step Cache",
    "FluxAccelReport": "Flux Accel Report",
}
# The files that the workflows name. Validation looks at names only, so the content does not matter.
MODEL_FILES = (
    "diffusion_models/flux1-dev.safetensors",
    "diffusion_models/flux-2-klein-4b.safetensors",
    "diffusion_models/flux-2-klein-9b-fp8.safetensors",
    "text_encoders/clip_l.safetensors",
    "text_encoders/t5xxl_fp16.safetensors",
    "text_encoders/qwen_3_4b.safetensors",
    "text_encoders/qwen_3_8b_fp8mixed.safetensors",
    "vae/ae.safetensors",
    "vae/flux2-vae.safetensors",
    "loras/Hyper-FLUX.1-dev-8steps-lora.safetensors",
    "loras/flux_dev_frostinglane_araminta_k.safetensors",
    "loras/Flux_klein_4b_anime_Koni.safetensors",
    "loras/flux2-klein-4b-lora-old-gods.safetensors",
    "loras/ugly_kontext_klein_4b_v1.safetensors",
    "loras/dever_arcane_flux2_klein_9b.safetensors",
)
# Lies in the input folder of every ComfyUI.
INPUT_PICTURE = "example.png"
CHROMIUM_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking")
FRONTEND_IS_READY = "!!(window.app?.extensionManager && window.LiteGraph?.registered_node_types['FluxHotswapLora'])"
OPEN = "async workflow => { await app.loadGraphData(workflow, true, true, 'test'); }"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    base = tmp_path_factory.mktemp("base")
    for name in MODEL_FILES:
        write_tensors(base / "models" / name, {"placeholder": torch.zeros(1)})
    (base / "input").mkdir()
    Image.new("RGB", (64, 64)).save(base / "input" / INPUT_PICTURE)
    settings = base / "user" / "default" / "comfy.settings.json"
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps({"Comfy.TutorialCompleted": True}))
    with ComfyServer(base) as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=require_chromium(), args=list(CHROMIUM_FLAGS))
        yield chromium
        chromium.close()


class Frontend:
    """One page with the frontend in it.

    `errors` holds what the console reports after the start: a fresh user folder lacks files that the frontend asks for
    while it starts.
    """

    def __init__(self, page, url):
        self.page = page
        self.errors = []
        page.set_default_timeout(60_000)
        page.goto(url)
        page.wait_for_function(FRONTEND_IS_READY)
        expect(page.get_by_test_id("queue-button")).to_be_visible()
        page.wait_for_load_state("networkidle")
        page.on("console", self._on_console)
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    def _on_console(self, message):
        url = message.location.get("url", "")
        # The frontend asks for a help page in the user's language first, then for the one that we have.
        if message.type == "error" and not re.search(r"/docs/\w+/\w+\.md$", url):
            self.errors.append(f"{message.text} ({url})")

    @property
    def complaint(self):
        """What the frontend shows when nodes or models are missing."""
        return self.page.get_by_text(re.compile(r"\d+ errors? found"))

    def open(self, workflow):
        self.page.evaluate(OPEN, workflow)

    def open_template(self, name):
        self.page.get_by_role("button", name="Templates").first.click()
        dialog = self.page.get_by_role("dialog")
        dialog.get_by_text(PACK_NAME, exact=True).first.click()
        dialog.get_by_test_id(f"template-workflow-{name}").click()
        expect(dialog).to_have_count(0)
        count = len(ui_workflow(name)["nodes"])
        self.page.wait_for_function("count => app.graph.nodes.length === count", arg=count)

    def settle(self):
        """Give the frontend time to complain: it looks for missing models after it shows the graph."""
        self.page.wait_for_load_state("networkidle")
        self.page.wait_for_timeout(1500)

    def show_help(self, node_type):
        self.page.evaluate(
            """type => {
                let node = app.graph.nodes.find(node => node.type === type);
                if (!node) app.graph.add(node = LiteGraph.createNode(type));
                app.canvas.centerOnNode(node);  // or the side bar lies over the toolbar of a new one
                app.canvas.selectNode(node);
            }""",
            node_type,
        )
        self.page.get_by_test_id("info-button").click()
        return self.page.locator(".node-help-content")


@pytest.fixture
def frontend(server, browser):
    page = browser.new_page(viewport={"width": 1920, "height": 1000}, locale="en-US")
    yield Frontend(page, server.url)
    page.close()


def ui_workflow(name):
    return json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))


def api_workflow(name):
    return json.loads((WORKFLOWS / "api" / f"{name}.json").read_text(encoding="utf-8"))


def served(server, path):
    return http_request(f"{server.url}/{path}")


# Files and server


def test_every_workflow_has_its_picture_and_its_twin():
    assert sorted(path.stem for path in WORKFLOWS.glob("*.json")) == sorted(NAMES)
    assert sorted(path.stem for path in WORKFLOWS.glob("*.jpg")) == sorted(NAMES)
    assert sorted(path.stem for path in (WORKFLOWS / "api").iterdir()) == sorted(NAMES)


def test_server_lists_the_templates_and_nothing_else(server):
    listed = json.loads(served(server, "workflow_templates"))
    assert sorted(listed[PACK_NAME]) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_server_serves_template_and_picture(server, name):
    assert json.loads(served(server, f"api/workflow_templates/{PACK_NAME}/{name}.json")) == ui_workflow(name)
    picture = served(server, f"api/workflow_templates/{PACK_NAME}/{name}.jpg")
    assert len(picture) <= 60_000
    assert Image.open(io.BytesIO(picture)).format == "JPEG"


@pytest.mark.parametrize("name", NAMES)
def test_twin_passes_validation(server, name):
    with server.client() as client:
        prompt_id = client.queue(api_workflow(name))  # raises GraphRejected with ComfyUI's reasons
        http_request(f"{server.url}/queue", {"delete": [prompt_id]})
        client.interrupt()
        with contextlib.suppress(PromptLost):  # if it was deleted before it began
            assert client.wait(prompt_id, timeout=60).node_errors == {}


def rectangles(workflow):
    return [(node["id"], *node["pos"], *node["size"]) for node in workflow["nodes"]]


@pytest.mark.parametrize("name", NAMES)
def test_layout_has_no_overlaps(name):
    title_px = 30
    boxes = rectangles(ui_workflow(name))
    for index, (first, x1, y1, w1, h1) in enumerate(boxes):
        for second, x2, y2, w2, h2 in boxes[index + 1 :]:
            apart = x1 + w1 <= x2 or x2 + w2 <= x1 or y1 + h1 <= y2 - title_px or y2 + h2 <= y1 - title_px
            assert apart, f"nodes {first} and {second} overlap"


# The frontend


@pytest.mark.parametrize("name", NAMES)
def test_template_opens_and_converts_to_its_twin(frontend, name, tmp_path):
    frontend.open_template(name)
    frontend.settle()
    frontend.page.screenshot(path=os.environ.get("FLUX_HOTSWAP_SCREENSHOTS", str(tmp_path)) + f"/{name}.png")

    expect(frontend.complaint).to_have_count(0)
    assert frontend.page.evaluate("app.graph.nodes.filter(node => node.has_errors).length") == 0
    assert frontend.page.evaluate("async () => (await app.graphToPrompt()).output") == api_workflow(name)
    assert frontend.errors == []


def test_missing_node_or_model_would_be_seen(frontend):
    """The control of the test above: what it asserts absent does appear."""
    workflow = ui_workflow(NAMES[1])
    for node in workflow["nodes"]:
        if node["type"] == "FluxHotswapLora":
            node["type"] = "NoSuchNode"
        if node["type"] == "FluxAccelLoader":
            node["widgets_values"][0] = "no-such-file.safetensors"
    frontend.open(workflow)

    expect(frontend.complaint).to_be_visible()
    assert frontend.page.evaluate("async () => (await app.graphToPrompt()).output") != api_workflow(NAMES[1])


@pytest.mark.parametrize("node_type", NODES)
def test_help_page_is_shown(frontend, server, node_type):
    text = served(server, f"extensions/{PACK_NAME}/docs/{node_type}.md").decode()
    assert text == (REPO / "web" / "docs" / f"{node_type}.md").read_text(encoding="utf-8")
    frontend.open(ui_workflow(NAMES[0]))
    shown = frontend.show_help(node_type)

    expect(shown.get_by_role("heading", name=NODES[node_type])).to_be_visible()
    expect(shown.get_by_role("heading", name="What errors mean")).to_be_attached()
    assert frontend.errors == []


@pytest.mark.parametrize("node_type", NODES)
def test_help_page_explains_every_input(server, node_type):
    text = (REPO / "web" / "docs" / f"{node_type}.md").read_text(encoding="utf-8")
    for name in inputs_of(server, node_type):
        assert f"| `{name}` |" in text, f"{node_type}.md has no line for the input {name}"


def inputs_of(server, node_type):
    schema = json.loads(served(server, f"object_info/{node_type}"))[node_type]
    # Output nodes also have hidden inputs, which nobody sees.
    kinds = [schema["input"].get(kind, {}) for kind in ("required", "optional")]
    return {name: entry[1] for kind in kinds for name, entry in kind.items()}


@pytest.mark.parametrize("node_type", NODES)
def test_translations_follow_the_schema(server, node_type):
    schema = json.loads(served(server, f"object_info/{node_type}"))[node_type]
    inputs = inputs_of(server, node_type)
    translations = json.loads(served(server, "i18n"))

    english = translations["en"]["nodeDefs"][node_type]
    assert english["display_name"] == schema["display_name"]
    assert english["description"] == schema["description"]
    assert {name: entry["tooltip"] for name, entry in english["inputs"].items()} == {
        name: options["tooltip"] for name, options in inputs.items()
    }
    chinese = translations["zh"]["nodeDefs"][node_type]
    assert chinese["inputs"].keys() == english["inputs"].keys()
    assert chinese["outputs"].keys() == english["outputs"].keys()
    texts = [chinese["display_name"], chinese["description"], *(e["tooltip"] for e in chinese["inputs"].values())]
    assert all(re.search(r"[\u4e00-\u9fff]", text) for text in texts)


def test_chinese_names_appear(server, browser):
    settings = f"{server.url}/settings"
    http_request(settings, {"Comfy.Locale": "zh"})
    page = browser.new_page(viewport={"width": 1920, "height": 1000})
    try:
        frontend = Frontend(page, server.url)
        frontend.open(ui_workflow(NAMES[1]))
        titles = page.evaluate("Object.fromEntries(app.graph.nodes.map(node => [node.type, node.title]))")
        labels = page.evaluate(
            "app.graph.nodes.find(node => node.type === 'FluxHotswapLora').widgets.map(widget => widget.label)"
        )
        menu = page.evaluate("LiteGraph.registered_node_types['FluxHotswapLora'].category")
        assert frontend.errors == []
    finally:
        page.close()
        http_request(settings, {"Comfy.Locale": "en"})

    chinese = json.loads((REPO / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))
    shown = [type_ for type_ in NODES if type_ in titles]
    assert {"FluxAccelLoader", "FluxHotswapLora"} <= set(shown)
    assert {type_: titles[type_] for type_ in shown} == {type_: chinese[type_]["display_name"] for type_ in shown}
    assert labels == ["LoRA名称", "强度", "CLIP强度", "起始百分比", "结束百分比", "最大秩"]
    assert menu == "Flux 热切换"


def test_no_page_for_an_unknown_node(server):
    with pytest.raises(urllib.error.HTTPError, match="404"):
        served(server, f"extensions/{PACK_NAME}/docs/NoSuchNode.md")
