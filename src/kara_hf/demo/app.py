"""The page: what can be chosen, and what the buttons do. What is seen of a run is `player.js`."""

import warnings
from functools import partial
from typing import Any

import gradio as gr

from .handlers import Desk
from .models import BUNDLED, Models
from .page import make_page, read
from .presets import CHOICES, DEEP_LENGTHS, DEFAULTS, KARA, OWN, SCORES, TASKS, TRACE
from .request import PACES, Limits
from .sessions import Shows

METRICS = ["l2", "l1", "recency", "random"]
ABOUT = (
    "<h1>kara_hf</h1><p>What a compressed KV cache keeps of a text while it is generated, what it drops, and whether "
    "the answer survives.</p>"
)
CSS = """
.gradio-container .main.fillable { max-width: none; padding: .6rem .8rem 1rem; }
#about { padding: 0 !important; }
#about h1 { margin: 0; font-size: 1.2rem; display: inline; font-weight: 700; }
#about p { display: inline; margin-left: .7rem; }
#controls { gap: .5rem; }
#controls div.block { padding: .35rem .5rem; }
#controls label.block { display: block; padding: 0; }
#controls .row { gap: .5rem; }
#buttons { gap: .35rem; flex-wrap: nowrap; }
#buttons button { min-width: 0; padding: .35rem .2rem; flex: 1 1 0; }
#settings .form, #size .form { display: grid; grid-template-columns: 1fr 1fr; align-items: end;
  background: var(--block-background-fill); }
#settings .form > *, #size .form > * { min-width: 0 !important; }
#size .form:not(:has(> *)) { display: none; }
#set-score, #set-metric, #set-compress_prompt { grid-column: 1 / -1; }
#status { padding: 0 !important; min-height: 0; }
#status .error { color: #b34700; font-weight: 600; overflow-wrap: anywhere; }
.dark #status .error { color: #ff9a52; }
#player { padding: 0 !important; }
footer { display: none !important; }
"""
# The style goes in by hand: Gradio's own `css` drops container queries.
ON_LOAD = """
const style = document.createElement("style");
style.textContent = props.css;
document.head.append(style);
window.player = new Player(element, {
  poll: (key, have) => server.poll([key, have]),
  page: key => server.standalone(key),
});
"""
FOLLOW = "text => { const {show} = JSON.parse(text || '{}'); if (show) window.player.follow(show); }"


def build(models: Models, limits: Limits, shows: Shows) -> gr.Blocks:
    """The app, not launched.

    Args:
        models: what can be chosen.
        limits: what may be asked for.
        shows: where running shows are kept.
    """

    async def poll(asked: list[Any]) -> dict[str, Any] | None:
        """What is new of a show, for a player that knows its key."""
        key, have = asked
        show = shows.find(key)
        return None if show is None else show.since(have)

    async def standalone(key: str) -> str:
        """The page that plays a show without Python."""
        show = shows.find(key)
        return "" if show is None else make_page(show.to_dict())

    with gr.Blocks(title="kara_hf", analytics_enabled=False, fill_width=True) as app:
        gr.HTML(ABOUT, elem_id="about")
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=250, elem_id="controls"):
                with gr.Row(elem_id="buttons"):
                    start = gr.Button("Start", variant="primary", elem_id="start")
                    pause = gr.Button("Pause", elem_id="pause")
                    step = gr.Button("Step", elem_id="step")
                    stop = gr.Button("Stop", variant="stop", elem_id="stop")
                status = gr.HTML("", elem_id="status")
                model = gr.Dropdown(
                    models.names,
                    value=models.names[0],
                    allow_custom_value=True,
                    label="Model",
                    info="Bundled, or any hub id" if models.hub else "Bundled",
                    elem_id="model",
                )
                task = gr.Radio(list(TASKS), value=TRACE, label="Task", info=TASKS[TRACE].about, elem_id="task")
                with gr.Row(elem_id="size"):
                    length = gr.Number(TASKS[TRACE].length, label="Tokens", precision=0, elem_id="length")
                    number = gr.Number(0, label="Problem", precision=0, elem_id="number")
                text = gr.Textbox(label="Text to continue", lines=4, visible=False, elem_id="text")
                choice = gr.Dropdown(
                    list(CHOICES), value=KARA, label="Method", info=CHOICES[KARA].about, elem_id="choice"
                )
                beside = gr.Checkbox(True, label="Full cache beside it", elem_id="beside")
                with gr.Row(elem_id="settings"):
                    fields = _fields()
                with gr.Accordion("Sampling, limits, speed", open=False):
                    pace = gr.Radio(list(PACES), value="100 tokens/s", label="Show at", elem_id="pace")
                    most = f"0: enough for the task; at most {limits.new:,}"
                    new = gr.Number(0, label="Most new tokens", info=most, precision=0, elem_id="new")
                    temperature = gr.Number(0, label="Temperature", info="0: greedy", elem_id="temperature")
                    about = "Of sampling and of random choices"
                    seed = gr.Number(0, label="Seed", info=about, precision=0, elem_id="seed")
            with gr.Column(scale=5, min_width=320):
                gr.HTML(
                    "",
                    html_template="<div></div>",
                    js_on_load=read("player.js") + ON_LOAD,
                    server_functions=[poll, standalone],
                    elem_id="player",
                    css=read("player.css") + CSS,
                    apply_default_css=False,
                )
        signal = gr.Textbox(visible="hidden", elem_id="signal")
        ticket = gr.Textbox(visible="hidden", elem_id="ticket")

        desk = Desk(models, limits, shows, list(fields))
        asked = [model, task, length, number, text, choice, beside, new, temperature, seed, pace, *fields.values()]
        at_once: dict[str, Any] = {"queue": False, "show_progress": "hidden"}
        begun = ticket.change(
            desk.begin,
            [ticket, *asked],
            [signal, status],
            concurrency_limit=limits.runs,
            concurrency_id="runs",
            show_progress="hidden",
            trigger_mode="multiple",
        )
        start.click(desk.start, None, [ticket, status], cancels=begun, **at_once)
        step.click(desk.step, None, [ticket, status], **at_once)
        stop.click(desk.stop, cancels=begun, **at_once)
        pause.click(desk.pause, **at_once)
        signal.change(None, signal, None, js=FOLLOW)
        app.unload(desk.close)

        shown, given = [choice, model, length, *fields.values()], [task, choice, model]
        task.input(partial(_show_task, list(fields)), given, [task, number, text, *shown], **at_once)
        choice.input(partial(_show_choice, list(fields)), given, shown, **at_once)
    return app


def _fields() -> dict[str, Any]:
    """The settings of all methods, by name; those of the first one are visible."""

    def field(kind: Any, name: str, label: str, info: str | None, **options: Any) -> Any:
        visible = name in CHOICES[KARA].settings
        return kind(value=DEFAULTS[name], label=label, info=info, visible=visible, elem_id=f"set-{name}", **options)

    def number(name: str, label: str, info: str) -> Any:
        return field(gr.Number, name, label, info, precision=0)

    return {
        "retention": field(gr.Number, "retention", "Retention", "Share kept", step=0.05),
        "window": number("window", "Window", "Judged together"),
        "recent": number("recent", "Recent", "Always whole"),
        "anchor_share": field(gr.Number, "anchor_share", "Anchor share", "1: top-k", step=0.1),
        "protected": number("protected", "Protected", "Newest that stay"),
        "sinks": number("sinks", "Sinks", "First that stay"),
        "observation": number("observation", "Observation", "Queries that vote"),
        "block_size": number("block_size", "Block size", "Slots per block"),
        "score": field(gr.Dropdown, "score", "Score", "What ranks tokens; or a control", choices=SCORES),
        "metric": field(gr.Dropdown, "metric", "Metric", "What votes add up to; or a control", choices=METRICS),
        "compress_prompt": field(gr.Checkbox, "compress_prompt", "Compress the prompt too", None),
    }


def _show_task(settings: list[str], task: str, choice: str, model: str) -> tuple[Any, ...]:
    """What changes on the page when a task is chosen: its own fields, and the method that shows most of it."""
    preset, own = TASKS[task], task == OWN
    suggested = choice if preset.method is None or CHOICES[choice].shares else preset.method
    fields = gr.update(visible=not own), gr.update(visible=own)
    return gr.update(info=preset.about), *fields, *_show_choice(settings, task, suggested, model)


def _show_choice(settings: list[str], task: str, choice: str, model: str) -> tuple[Any, ...]:
    """What changes when a method is chosen: its settings, and for PoD the model, with what it can follow."""
    chosen, (small, deep) = CHOICES[choice], BUNDLED
    if chosen.shares and model == small:
        model = deep
    elif not chosen.shares and model == deep:
        model = small
    length = DEEP_LENGTHS.get(task) if model == deep else TASKS[task].length
    shown = gr.update(visible=False) if task == OWN else gr.update(value=length, visible=True)
    updates = {each: gr.update(visible=each in chosen.settings) for each in settings}
    updates["retention"] = gr.update(visible="retention" in chosen.settings, value=chosen.retention)
    return gr.update(value=choice, info=chosen.about), gr.update(value=model), shown, *updates.values()


def launch(models: Models, limits: Limits, shows: Shows | None = None, **options: Any) -> gr.Blocks:
    """Serves the app until it is interrupted; `options` are those of `gradio.Blocks.launch`."""
    # Newer versions of Transformers have another name for it, which older ones do not know.
    warnings.filterwarnings("ignore", message="`past_key_values` is deprecated", category=FutureWarning)
    app = build(models, limits, shows or Shows())
    app.queue(max_size=64)
    theme = gr.themes.Default(
        primary_hue="blue",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
        spacing_size="sm",
        text_size="sm",
    ).set(block_info_text_color="#5c6470", block_info_text_color_dark="#a2a9b4")
    app.launch(theme=theme, max_file_size="1kb", enable_monitoring=False, footer_links=[], **options)
    return app
