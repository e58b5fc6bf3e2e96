"""The page: what can be chosen, and what the buttons do. What is seen of a run is `player.js`."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import gradio as gr
from gradio.components import Component

from .handlers import Handlers
from .models import BUNDLED, SUGGESTED, Models
from .page import make_page, read
from .presets import BITS, KARA, METHOD_PRESETS, OWN, SCORES, TASK_PRESETS, TRACE, defaults_of
from .request import PACES, DemoRequest, Limits
from .sessions import Sessions

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
FOLLOW = "text => { const {session} = JSON.parse(text || '{}'); if (session) window.player.follow(session); }"


@dataclass(frozen=True)
class Controls:
    """What a visitor presses and fills in; `settings` are those of all methods, by name."""

    start: gr.Button
    pause: gr.Button
    step: gr.Button
    stop: gr.Button
    status: gr.HTML
    model: gr.Dropdown
    task: gr.Radio
    length: gr.Number
    number: gr.Number
    text: gr.Textbox
    choice: gr.Dropdown
    beside: gr.Checkbox
    settings: dict[str, Component]
    pace: gr.Radio
    new: gr.Number
    temperature: gr.Number
    seed: gr.Number

    @property
    def asked(self) -> list[Component]:
        """The fields, in the order in which `DemoRequest` takes their values."""
        names = [field.name for field in fields(DemoRequest)][:-1]
        return [*(getattr(self, name) for name in names), *self.settings.values()]


def build(models: Models, limits: Limits, sessions: Sessions) -> gr.Blocks:
    """The app, not launched.

    Args:
        models: what can be chosen.
        limits: what may be asked for.
        sessions: where those that go on are kept.
    """
    with gr.Blocks(title="kara_hf", analytics_enabled=False, fill_width=True) as app:
        gr.HTML(ABOUT, elem_id="about")
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=250, elem_id="controls"):
                controls = _controls(models, limits)
            with gr.Column(scale=5, min_width=320):
                _player(sessions)
        _connect(app, controls, Handlers(models, limits, sessions, list(controls.settings)), limits)
    return app


def _controls(models: Models, limits: Limits) -> Controls:
    with gr.Row(elem_id="buttons"):
        start = gr.Button("Start", variant="primary", elem_id="start")
        pause = gr.Button("Pause", elem_id="pause")
        step = gr.Button("Step", elem_id="step")
        stop = gr.Button("Stop", variant="stop", elem_id="stop")
    status = gr.HTML("", elem_id="status")
    model = gr.Dropdown(
        [*models.names, SUGGESTED] if models.hub and SUGGESTED not in models.names else models.names,
        value=models.names[0],
        allow_custom_value=True,
        label="Model",
        info="Bundled, or any hub id" if models.hub else "Bundled",
        elem_id="model",
    )
    task = gr.Radio(list(TASK_PRESETS), value=TRACE, label="Task", info=TASK_PRESETS[TRACE].about, elem_id="task")
    with gr.Row(elem_id="size"):
        length = gr.Number(TASK_PRESETS[TRACE].length, label="Tokens", precision=0, elem_id="length")
        number = gr.Number(0, label="Problem", precision=0, elem_id="number")
    text = gr.Textbox(label="Text to continue", lines=4, visible=False, elem_id="text")
    about = METHOD_PRESETS[KARA].about
    choice = gr.Dropdown(list(METHOD_PRESETS), value=KARA, label="Method", info=about, elem_id="choice")
    beside = gr.Checkbox(True, label="Full cache beside it", elem_id="beside")
    with gr.Row(elem_id="settings"):
        settings = _settings(defaults_of(models.names[0]))
    with gr.Accordion("Sampling, limits, speed", open=False):
        pace = gr.Radio(list(PACES), value="100 tokens/s", label="Show at", elem_id="pace")
        most = f"0: enough for the task; at most {limits.new:,}"
        new = gr.Number(0, label="Most new tokens", info=most, precision=0, elem_id="new")
        temperature = gr.Number(0, label="Temperature", info="0: greedy", elem_id="temperature")
        about = "Of sampling and of random choices"
        seed = gr.Number(0, label="Seed", info=about, precision=0, elem_id="seed")
    return Controls(
        start,
        pause,
        step,
        stop,
        status,
        model,
        task,
        length,
        number,
        text,
        choice,
        beside,
        settings,
        pace,
        new,
        temperature,
        seed,
    )


def _settings(values: dict[str, Any]) -> dict[str, Component]:
    """The settings of all methods, by name, and what they begin with; those of the first one are visible."""

    def field(kind: Callable[..., Component], name: str, label: str, info: str | None, **options: Any) -> Component:
        visible = name in METHOD_PRESETS[KARA].settings
        return kind(value=values[name], label=label, info=info, visible=visible, elem_id=f"set-{name}", **options)

    def number(name: str, label: str, info: str) -> Component:
        return field(gr.Number, name, label, info, precision=0)

    def newest(name: str, label: str, info: str) -> Component:
        return field(gr.Number, name, label, f"{info}; below 1 a share", step=0.1)

    return {
        "retention": field(gr.Number, "retention", "Retention", "Share kept", step=0.05),
        "window": number("window", "Window", "Judged together"),
        "recent": newest("recent", "Recent", "Always whole"),
        "anchor_share": field(gr.Number, "anchor_share", "Anchor share", "1: top-k", step=0.1),
        "protected": newest("protected", "Protected", "Newest that stay"),
        "sinks": number("sinks", "Sinks", "First that stay"),
        "pin": field(gr.Textbox, "pin", "Pinned", "0:20, or system", max_lines=1),
        "bits": field(gr.Dropdown, "bits", "Bits", "Of what has settled", choices=BITS),
        "observation": number("observation", "Observation", "Queries that vote"),
        "block_size": number("block_size", "Block size", "Slots per block"),
        "score": field(gr.Dropdown, "score", "Score", "What ranks tokens; or a control", choices=SCORES),
        "metric": field(gr.Dropdown, "metric", "Metric", "What votes add up to; or a control", choices=METRICS),
        "compress_prompt": field(gr.Checkbox, "compress_prompt", "Compress the prompt too", None),
    }


def _player(sessions: Sessions) -> None:
    async def poll(asked: list[Any]) -> dict[str, Any] | None:
        """What is new of a session, for a player that knows its key."""
        key, have = asked
        session = sessions.find(key)
        return None if session is None else session.since(have)

    async def standalone(key: str) -> str:
        """The page that plays a session without Python."""
        session = sessions.find(key)
        return "" if session is None else make_page(session.to_dict())

    gr.HTML(
        "",
        html_template="<div></div>",
        js_on_load=read("player.js") + ON_LOAD,
        server_functions=[poll, standalone],
        elem_id="player",
        css=read("player.css") + CSS,
        apply_default_css=False,
    )


def _connect(app: gr.Blocks, controls: Controls, handlers: Handlers, limits: Limits) -> None:
    """Says what is called when something is pressed or chosen, and when a visitor leaves."""
    signal = gr.Textbox(visible="hidden", elem_id="signal")
    ticket = gr.Textbox(visible="hidden", elem_id="ticket")
    at_once: dict[str, Any] = {"queue": False, "show_progress": "hidden"}
    begun = ticket.change(
        handlers.begin,
        [ticket, *controls.asked],
        [signal, controls.status],
        concurrency_limit=limits.runs,
        concurrency_id="runs",
        show_progress="hidden",
        trigger_mode="multiple",
    )
    controls.start.click(handlers.start, None, [ticket, controls.status], cancels=begun, **at_once)
    controls.step.click(handlers.step, None, [ticket, controls.status], **at_once)
    controls.stop.click(handlers.stop, cancels=begun, **at_once)
    controls.pause.click(handlers.pause, **at_once)
    signal.change(None, signal, None, js=FOLLOW)
    app.unload(handlers.close)

    task, choice, model, settings = controls.task, controls.choice, controls.model, controls.settings
    shown, given = [choice, model, controls.length, *settings.values()], [task, choice, model]
    updated = [task, controls.number, controls.text, *shown]
    for control, show, changed in ((task, _show_task, updated), (choice, _show_choice, shown)):
        control.input(partial(show, list(settings), handlers.models), given, changed, **at_once)
    model.input(partial(_show_model, list(settings)), [choice, model], list(settings.values()), **at_once)


def _show_task(settings: list[str], models: Models, task: str, choice: str, model: str) -> tuple[Any, ...]:
    """What changes on the page when a task is chosen: its own fields, and the method that shows most of it."""
    preset, own = TASK_PRESETS[task], task == OWN
    suggested = choice if preset.method is None or METHOD_PRESETS[choice].shares else preset.method
    fields = gr.update(visible=not own), gr.update(visible=own)
    return gr.update(info=preset.about), *fields, *_show_choice(settings, models, task, suggested, model)


def _show_choice(settings: list[str], models: Models, task: str, choice: str, model: str) -> tuple[Any, ...]:
    """What changes when a method is chosen: its settings, and for PoD the model, if a bundled one has no map."""
    chosen, before = METHOD_PRESETS[choice], model
    if chosen.shares and model in BUNDLED:
        model = models.with_map or model
    shown = gr.update(visible=False) if task == OWN else gr.update(value=TASK_PRESETS[task].length, visible=True)
    fields = _fields(settings, choice, {} if model == before else defaults_of(model))
    return gr.update(value=choice, info=chosen.about), gr.update(value=model), shown, *fields


def _show_model(settings: list[str], choice: str, model: str) -> tuple[Any, ...]:
    """What changes when a model is chosen: what the settings begin with."""
    return _fields(settings, choice, defaults_of(model))


def _fields(settings: list[str], choice: str, values: dict[str, Any]) -> tuple[Any, ...]:
    """The settings that a method has, those of `values` with another value, and with the share that it begins with."""
    chosen = METHOD_PRESETS[choice]
    values = {**values, "retention": chosen.retention}
    changed = ({"value": values[each]} if each in values else {} for each in settings)
    return tuple(
        gr.update(visible=each in chosen.settings, **value) for each, value in zip(settings, changed, strict=True)
    )


def launch(models: Models, limits: Limits, sessions: Sessions | None = None, **options: Any) -> gr.Blocks:
    """Serves the app until it is interrupted; `options` are those of `gradio.Blocks.launch`."""
    app = build(models, limits, sessions or Sessions())
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
