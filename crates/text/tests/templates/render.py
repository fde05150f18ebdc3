"""Renders every case of cases.json with jinja2 in the environment that Hugging Face gives chat templates
and writes the results beside them.

    python3 render.py          # rewrites cases.json in place; needs jinja2 3.1

The Rust tests compare ChatTemplate::render with what is written here, byte by byte."""
import datetime
import json
import pathlib

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

NOW = datetime.datetime(2026, 3, 7, 9, 5, 2)


def raise_exception(message):
    raise jinja2.exceptions.TemplateError(message)


def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def render(case):
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = NOW.strftime
    return env.from_string(case["template"]).render(
        messages=case["messages"], tools=case.get("tools"), add_generation_prompt=case.get("add_generation_prompt", False),
        bos_token="<s>", eos_token="</s>", **case.get("extra", {}))


path = pathlib.Path(__file__).with_name("cases.json")
cases = json.loads(path.read_text())
for case in cases:
    case.pop("expected", None), case.pop("raises", None)
    try:
        case["expected"] = render(case)
    except jinja2.exceptions.TemplateError as error:
        case["raises"] = str(error)
path.write_text(json.dumps(cases, ensure_ascii=False, indent=1) + "\n")
