"""The pages in a real browser: they render, ask for nothing, run nothing of what they show, and weigh as pact does."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import yaml
from browser import CHROMIUM, Browser
from test_report import lines, record
from viewer_setup import HOSTILE, hostile_task, task, trace

from pact.envs.toybox_text import build_tokenizer
from pact.evaluate import save_records
from pact.objective import PactConfig
from pact.report import write_report
from pact.schedules import REASONING_ANNEALS, linear, supervised_segments
from pact.viewer import Attempt, display, supervised_weights, view_task
from pact.viewer_html import inspect_page
from pact.viewer_page import write_page

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="these tests drive a browser and there is none: apt-get install chromium"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def page_of(folder, tasks, config, progress=0.0, rollouts=()):
    tokenizer = build_tokenizer()
    shown = [display(view_task(item, tokenizer, rollouts), tokenizer, config, progress) for item in tasks]
    return write_page(folder / "page.html", inspect_page(shown, config, progress)), shown


WEIGHTS = """[...document.querySelectorAll(".seq.trace .run")].map(run => [
    Number(run.dataset.start), Number(run.dataset.tokens), run.dataset.component, Number(run.dataset.segment),
    Number(run.dataset.segments), Number(run.dataset.w ?? 0),
    [...run.querySelectorAll(".t")].filter(token => !token.matches(".out")).length])"""


@pytest.mark.parametrize("anneal", REASONING_ANNEALS)
def test_the_slider_weighs_as_the_schedules_do(browser, tmp_path, anneal):
    """At every position tried the browser's weights are bit for bit those of pact.schedules and of the objective."""
    expert = trace()
    expert[0]["reasoning_content"] = " ".join(f"Sentence number {i}." for i in range(10))
    config = PactConfig(reasoning_anneal=anneal, tool_call_weight=(0.9, 0.3), answer_weight=0.25)
    path, [shown] = page_of(tmp_path, [task(expert=expert)], config)
    browser.open(path)
    for step in (0, 1, 100, 125, 300, 333, 500, 700, 900, 999, 1000):
        s = step / 1000
        browser.run(f'slider.value = "{s}"; slider.dispatchEvent(new Event("input"))')
        weight_N = supervised_weights(shown.view.trace, config, s)
        runs = browser.run(WEIGHTS)
        assert sum(tokens for _, tokens, *_ in runs) == len(weight_N)
        for start, tokens, component, segment, segments, weight, kept in runs:
            weights = weight_N[start : start + tokens].tolist()
            assert weights == [weight] * kept + [0.0] * (tokens - kept), (s, component, segment)
            expected = {"tool_call": linear(0.9, 0.3, s), "answer": 0.25}.get(component, 0.0)
            if component == "reasoning":
                prefix = float(segment < supervised_segments(segments, s))
                scale = {"segment": prefix, "linear": linear(1.0, 0.0, s), "none": 1.0, "token": weights[0], "off": 0.0}
                expected = scale[anneal]
            assert weight == expected, (s, component, segment)
            assert kept == tokens or anneal == "token"
        told = browser.run('document.getElementById("sum-0").textContent')
        assert told == f"{int((weight_N > 0).sum())} tokens have weight, {weight_N.sum():.2f} in all"
    assert browser.run('getComputedStyle(document.querySelector(".run.c-tool_call")).getPropertyValue("--w")') == "0.3"
    assert browser.complaints == []


def test_a_boundary_within_a_segment_is_drawn_and_told(browser, tmp_path):
    """Of each block the first half stands out; the label counts its tokens, a token tells its own weight."""
    path, [shown] = page_of(tmp_path, [task()], PactConfig(reasoning_anneal="token"), progress=0.5)
    browser.open(path)
    [place, *_] = [i for i, token in enumerate(shown.weight_N) if not token]  # the first block begins the trace
    split = next(run for run in shown.sections[1].runs if run.start < place < run.start + len(run.ids))
    run = f"document.querySelector('.seq.trace .run[data-start=\"{split.start}\"]')"
    kept = place - split.start
    assert browser.run(f'{run}.querySelector(".note i").textContent') == f"{kept} of {len(split.ids)}"
    tokens = f'{run}.querySelectorAll(".t")'
    shades = [browser.run(f"getComputedStyle({tokens}[{at}]).color") for at in (kept - 1, kept)]
    assert shades[0] != shades[1]
    browser.run('document.querySelector(".seq.trace").focus()')
    browser.press("ArrowRight", place)
    assert " · weight 1 · " in browser.run('document.getElementById("here").textContent')
    browser.press("ArrowRight")
    assert " · weight 0 · " in browser.run('document.getElementById("here").textContent')
    browser.run('slider.value = "0"; slider.dispatchEvent(new Event("input"))')
    assert browser.run('document.querySelectorAll(".out").length') == 0
    assert browser.complaints == []


def test_the_page_opens_at_exactly_the_progress_asked_for(browser, tmp_path):
    """Just past 1/3 a block of three segments has two left; the slider would round it back to three."""
    expert = trace()
    expert[0]["reasoning_content"] = "One is this. Two is that. Three is it."
    config = PactConfig()
    path, [shown] = page_of(tmp_path, [task(expert=expert)], config, progress=0.3334)
    browser.open(path)
    view = shown.view
    supervised = int((supervised_weights(view.trace, config, 0.3334) > 0).sum())
    assert supervised < int((supervised_weights(view.trace, config, 0.333) > 0).sum())
    assert browser.run('document.getElementById("sum-0").textContent').startswith(f"{supervised} tokens have weight")


def test_the_address_and_the_keyboard_set_the_progress(browser, tmp_path):
    path, _ = page_of(tmp_path, [task()], PactConfig())
    browser.open(path, "#progress=0.5")
    assert browser.run('document.getElementById("progress-value").textContent') == "0.500"
    browser.run("slider.focus({ focusVisible: true })")
    browser.press("ArrowRight", 2)
    assert browser.run('document.getElementById("progress-value").textContent') == "0.502"
    assert browser.run('document.querySelector(".run.c-tool_call").dataset.w') == str(linear(0.8, 0.2, 0.502))
    browser.open(path, "#progress=2<script>")
    assert browser.run('document.getElementById("progress-value").textContent') == "0.000"


def test_arrow_keys_walk_through_the_tokens(browser, tmp_path):
    path, [shown] = page_of(tmp_path, [task()], PactConfig())
    browser.open(path)
    browser.run('document.querySelector(".seq.trace").focus()')
    browser.press("ArrowRight", 3)
    here = browser.run('document.getElementById("here").textContent')
    assert here.startswith(f"token 2 · id {shown.view.trace.ids[2]} · reasoning · segment 1 of 3 · weight 1 · ")
    browser.press("ArrowDown")
    assert "segment 2 of 3" in browser.run('document.getElementById("here").textContent')
    browser.press("ArrowUp")
    assert "segment 1 of 3" in browser.run('document.getElementById("here").textContent')


def test_the_page_shows_tree_and_rollouts(browser, tmp_path):
    config = PactConfig()
    path, [shown] = page_of(tmp_path, [task()], config, rollouts=[Attempt("good", trace(), 1.0)])
    browser.open(path)
    assert browser.run('document.querySelectorAll("svg.tree rect").length') == len(shown.tree.nodes)
    text = browser.run('document.querySelector("table").innerText')
    assert f"{shown.tree.savings['both'].saved}" in text
    boxes = browser.run(
        '[...document.querySelectorAll("svg.tree g")].map(g => { const r = g.querySelector("rect").getBBox();'
        ' return [r.x, r.x + r.width, g.querySelector("text").getBBox()]; })'
    )
    widest = browser.run('document.querySelector("svg.tree").viewBox.baseVal.width')
    assert max(right for _, right, _ in boxes) == pytest.approx(widest, abs=0.1)
    overflow = browser.run(
        '[...document.querySelectorAll("svg.tree g")].filter(g => g.querySelector("text").textContent && '
        'g.querySelector("text").getBBox().width > g.querySelector("rect").getBBox().width).length'
    )
    assert overflow == 0


@pytest.fixture(scope="module")
def server():
    """A server that notes what reaches it: each connection and the path of each request."""
    asked: list[str] = []

    class Listener(ThreadingHTTPServer):
        def verify_request(self, request, client_address):
            asked.append("connection")
            return True

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    server = Listener(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()


def hostile_run(folder, url):
    """A run in which every text tries to run or to load something."""
    mean, text = (
        hostile_task(),
        HOSTILE + f"<img src={url}/img><link rel=stylesheet href={url}/css><script src={url}/js>",
    )
    (folder / "config.yaml").write_text(yaml.safe_dump({"env": text.replace("\ud800", ""), "warm_start_steps": 3}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(item) + "\n" for item in lines()))
    for name, reward in (("eval_start", 0.0), ("eval_final", 1.0)):
        episodes = [record(mean.id, reward, trace(text, text), group=text), record("t1", 1.0, trace(text * 2000, text))]
        save_records(episodes, folder / f"{name}.jsonl")
    return write_report(folder, [mean, task("t1", text)])


@pytest.mark.parametrize("kind", ["inspect", "report"])
def test_nothing_is_loaded_and_nothing_hostile_runs(browser, tmp_path, server, kind):
    url, asked = server
    asked.clear()
    if kind == "inspect":
        played = [Attempt(HOSTILE, trace(f"<img src={url}/img>" + HOSTILE * 300, HOSTILE), 1.0)]
        path, _ = page_of(tmp_path, [hostile_task()], PactConfig(), rollouts=played)
    else:
        path = hostile_run(tmp_path, url)
    browser.open(path)
    browser.run('document.querySelectorAll("details").forEach(fold => fold.open = true)')
    browser.screenshot(tmp_path / "page.png")
    assert browser.run("typeof window.hacked") == "undefined"
    assert browser.requests == [path.as_uri()]
    assert browser.complaints == []
    assert browser.run('document.querySelectorAll("img, link, iframe, object, embed, form, a").length') == 0
    assert browser.run('document.querySelectorAll("script").length') == 2
    assert "window.hacked=1" in browser.run("document.body.innerText")
    assert "⟨U+202E⟩" in browser.run("document.body.innerText")
    assert asked == []

    # And were there a hole in the escaping, the policy would still hold: no request is made, no script runs.
    tries = f"""fetch("{url}/fetch").then(() => "loaded", () => "refused")"""
    assert browser.run(tries) == "refused"
    browser.run(f"""document.body.insertAdjacentHTML("beforeend", `<img src="{url}/img"><img src=x onerror="hacked=1">
        <iframe src="{url}/frame"></iframe><link rel="stylesheet" href="{url}/css">
        <div style="background:url({url}/bg)">x</div>`);
        const s = document.createElement("script"); s.textContent = "hacked = 1"; document.body.append(s);
        new Promise(done => setTimeout(done, 300))""")
    assert browser.run("typeof window.hacked") == "undefined"
    assert not [path for path in asked if path.startswith("/")]
    assert any("Content Security Policy" in text for text in browser.complaints)


def test_hover_and_keys_read_the_logged_values(browser, tmp_path):
    """Pointing at a plot, or walking along it, tells the values of metrics.jsonl."""
    (tmp_path / "config.yaml").write_text("env: toybox\n")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(item) + "\n" for item in lines()))
    browser.open(write_report(tmp_path, []))
    plots = browser.run('document.querySelectorAll(".plot").length')
    assert plots == 7
    values = 'document.querySelectorAll(".values")[2].innerText'
    assert "last" in browser.run(values)
    browser.run('document.querySelectorAll(".plot")[2].focus()')
    browser.press("Home")
    assert browser.run(values).split() == ["step", "1", "SFT", "1"]
    browser.press("ArrowRight", 3)
    assert browser.run(values).split() == ["step", "4", "SFT", "0.25"]
    browser.press("End")
    assert browser.run(values).split() == ["step", "80", "SFT", "0.0125"]
    box = browser.run(
        '(b => [b.x, b.y, b.width, b.height])(document.querySelectorAll(".plot")[0].getBoundingClientRect())'
    )
    x = box[0] + box[2] * (44 + (20 - 1) / 79 * 368) / 420
    browser.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=box[1] + box[3] / 2)
    told = browser.run('document.querySelectorAll(".values")[0].innerText').split()
    assert told[:5] == ["step", "20", "training", "rollouts", "0.25"]
    assert browser.complaints == []


@pytest.mark.parametrize(("dark", "width"), [(False, 1280), (True, 390)])
@pytest.mark.parametrize("kind", ["inspect", "report"])
def test_it_is_readable_in_light_and_dark_and_on_a_telephone(browser, tmp_path, kind, dark, width):
    """Text stands out from its ground (a contrast of 4.5, as WCAG AA asks); the page does not scroll sideways."""
    if kind == "inspect":
        config = PactConfig(reasoning_anneal="token")  # at half of it some tokens of a run have weight and others none
        path, _ = page_of(tmp_path, [task()], config, progress=0.5, rollouts=[Attempt("good", trace(), 1.0)])
    else:
        path = hostile_run(tmp_path, "http://127.0.0.1:9")
    browser.open(path)
    browser.run('document.querySelectorAll("details").forEach(fold => fold.open = true)')
    picture = browser.screenshot(tmp_path / "page.png", width=width, dark=dark)
    assert len(picture) > 10_000
    assert browser.run("document.documentElement.scrollWidth <= window.innerWidth")
    lowest = browser.run(CONTRAST)
    assert lowest[0] >= 4.5, lowest


# The lowest contrast of any text: colours are read off a canvas, grounds are laid over each other from the root.
CONTRAST = """(() => {
  const context = Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d");
  const over = (colours) => {
    context.fillStyle = "white"; context.fillRect(0, 0, 1, 1);
    for (const colour of colours) { context.fillStyle = colour; context.fillRect(0, 0, 1, 1); }
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = (rgb) => {
    const [r, g, b] = rgb.map((v) => (v / 255 <= 0.03928 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  let lowest = [99, ""];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || !element.getClientRects().length || element.closest("svg")) continue;
    const grounds = [];
    for (let e = element; e; e = e.parentElement) grounds.unshift(getComputedStyle(e).backgroundColor);
    const a = light(over(grounds)) + 0.05;
    const b = light(over([...grounds, getComputedStyle(element).color])) + 0.05;
    const contrast = Math.max(a, b) / Math.min(a, b);
    if (contrast < lowest[0]) lowest = [contrast, `${element.className} ${walker.currentNode.textContent.trim()}`];
  }
  return lowest;
})()"""
