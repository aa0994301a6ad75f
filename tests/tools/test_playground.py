"""`python -m tools.playground`: what it answers, and a visitor who clicks through it in Chromium."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import zoo
from tests.browser import opened
from tests.pretrain.runs import ROOT, environment, free_port
from tools import playground
from zoo.config import UserError
from zoo.generate import Part

CHOOSING = (0.8, 1.0, 1.0, 50, 40, 3)


def test_it_answers_with_what_comes_and_where_it_went(trained_run: Path, tmp_path: Path) -> None:
    run = zoo.load(trained_run / "run")
    Image.fromarray(np.full((9, 20), 90, np.uint8)).save(tmp_path / "in.png")
    prompt = playground._prompt(run, "a <b>", {"image": str(tmp_path / "in.png")}, False)
    assert [part.modality for part in prompt] == ["image", "text"]
    made, routed = playground._answered(run, prompt, "text", CHOOSING)
    expected = run.generate(prompt, "text", temperature=0.8, seed=3, max_tokens=40)
    assert made.count("data:image/png") == 1 and "a &lt;b&gt;" in made and routed.count('class="routed"') == 1
    assert isinstance(expected[0], Part) and "layer 1" in routed
    with pytest.raises(UserError, match=r"takes \d+ tokens"):
        playground._answered(run, [Part("text", "x" * 200)], playground.DECIDES, CHOOSING)


@pytest.mark.slow
def test_a_visitor_clicks_through_it(trained_run: Path, tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    content = io.BytesIO()
    Image.fromarray(np.tile(np.arange(0, 250, 10, dtype=np.uint8), (25, 1))).save(content, "PNG")
    port = free_port()
    words = [sys.executable, "-m", "tools.playground", str(trained_run / "run"), "--port", str(port)]
    with open(tmp_path / "printed", "w") as printed:
        server = subprocess.Popen(words, cwd=ROOT, env=environment(), stdout=printed, stderr=printed)
    try:
        _wait_for(f"http://127.0.0.1:{port}/", server, tmp_path / "printed")
        with opened(f"http://127.0.0.1:{port}/") as page:
            page.locator("#text textarea").fill("seven")
            page.locator("#image input[type=file]").set_input_files(
                {"name": "in.png", "mimeType": "image/png", "buffer": content.getvalue()}
            )
            page.locator("#image img").first.wait_for()
            page.locator("#then input").click()
            page.get_by_role("option", name="image").click()
            page.locator("#go").click()
            page.locator("#routed .routed").wait_for()
            assert page.locator("#made img").count() == 2
            page.locator("#routed .grid i").nth(3).click()
            assert re.search("layer 0: .*; layer 1: ", page.locator("#routed output").inner_text())
            page.screenshot(path=str(tmp_path / "playground.png"), full_page=True)
            page.locator("#text textarea").fill("x" * 300)
            page.locator("#go").click()
            page.get_by_text("was trained on 72 tokens").first.wait_for()
        assert (tmp_path / "playground.png").stat().st_size > 20_000
    finally:
        server.kill()
        server.wait()


def _wait_for(address: str, server: subprocess.Popen[bytes], printed: Path, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(printed.read_text())
