"""The system message of a chat is found among its tokens, whatever the template makes of it."""

import copy

import pytest
from support.tokenizing import tokenizer

from kara_hf import system_pin

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set s = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set s = '' %}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ s if loop.first }}{{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{% endif %}{% endfor %}"
)
BARE = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
REFUSES = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system message') }}{% endif %}" + BARE

SYSTEM = {"role": "system", "content": "Answer in one (message) of four words."}
CHAT = [{"role": "user", "content": " Where is the key? "}, {"role": "assistant", "content": "In the drawer."}]


def of(template, kind="bpe"):
    found = copy.deepcopy(tokenizer(kind))
    found.chat_template = template
    return found


@pytest.mark.parametrize("kind", ["bpe", "bytes", "unigram"])
@pytest.mark.parametrize(("template", "last"), [(CHATML, "user\n"), (LLAMA_2, "<</SYS>>\n\n"), (BARE, "words.\n")])
def test_it_reaches_to_the_first_other_message(template, last, kind):
    asked = of(template, kind)
    ((start, end),) = system_pin(asked, [SYSTEM, *CHAT])
    ids = asked.apply_chat_template([SYSTEM, *CHAT])["input_ids"]
    pinned, whole = asked.decode(ids[:end]), asked.decode(ids)
    assert start == 0 and whole.startswith(pinned) and "four words." in pinned and "Where" not in pinned
    if kind == "bytes":
        assert pinned.endswith(last)


def test_what_a_template_says_itself_counts():
    asked = of(CHATML)
    ((_, end),) = system_pin(asked, CHAT[:1], add_generation_prompt=True)
    ids = asked.apply_chat_template(CHAT[:1], add_generation_prompt=True)["input_ids"]
    assert "You are helpful." in asked.decode(ids[:end]) and "Where" not in asked.decode(ids[:end])


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (BARE, CHAT, "nothing in front of the first message"),
        (BARE, [SYSTEM], "a message of another role must come behind"),
        (REFUSES, [SYSTEM, *CHAT], "refuses the messages: no system message"),
        ("{{ messages[0]['role'] }}", [SYSTEM, *CHAT], "leaves out message 1"),
        (None, [SYSTEM, *CHAT], "chat_template"),
    ],
    ids=["none", "alone", "refused", "left out", "no template"],
)
def test_where_there_is_none_it_says_so(template, messages, message):
    with pytest.raises(ValueError, match=message):
        system_pin(of(template), messages)
