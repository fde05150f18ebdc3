"""Renders every case of cases.json and compat.json with jinja2 in the environment that Hugging Face gives
chat templates and writes the results beside them. compat.json is the table of methods, filters, tests and
statements that the engine does not have by itself.

    python3 render.py          # rewrites both in place; needs jinja2 3.1

The Rust tests compare ChatTemplate::render with what is written here, byte by byte."""
import datetime
import json
import pathlib

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

NOW = datetime.datetime(2026, 3, 7, 9, 5, 2)


class Generation(Extension):
    """What Hugging Face's tracker of assistant text renders: the body, in a scope of its own."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller):
        return caller()


def raise_exception(message):
    raise jinja2.exceptions.TemplateError(message)


def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def render(case):
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation])
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = NOW.strftime
    return env.from_string(case["template"]).render(
        messages=case["messages"], tools=case.get("tools"), add_generation_prompt=case.get("add_generation_prompt", False),
        bos_token="<s>", eos_token="</s>", **case.get("extra", {}))


folder = pathlib.Path(__file__).parent
for name, extra in (("cases.json", {}), ("compat.json", {"messages": [{"role": "user", "content": "hi"}], "extra": {"user": {"name": "Ann"}}})):
    cases = json.loads((folder / name).read_text())
    for case in cases:
        case.pop("expected", None), case.pop("raises", None)
        try:
            case["expected"] = render({**extra, **case})
        except jinja2.exceptions.TemplateError as error:
            case["raises"] = str(error)
        except (TypeError, ValueError, IndexError) as error:
            case["raises"] = str(error)
    (folder / name).write_text(json.dumps(cases, ensure_ascii=False, indent=1) + "\n")
