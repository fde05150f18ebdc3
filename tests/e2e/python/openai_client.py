"""Drives the OpenAI-compatible API with OpenAI's own client; any failure is an exception."""

import json
import sys

import openai


def main() -> None:
    base_url, model, prompt, expected = sys.argv[1:5]
    client = openai.OpenAI(base_url=base_url, api_key="unused", max_retries=0, timeout=120)
    messages = [{"role": "user", "content": prompt}]

    models = [entry.id for entry in client.models.list()]
    assert models == [model], models

    whole = client.chat.completions.create(model=model, messages=messages, temperature=0)
    assert whole.choices[0].message.content == expected, whole
    assert whole.choices[0].finish_reason == "stop", whole
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens, whole.usage

    parts, usage, reason = [], None, None
    stream = client.chat.completions.create(
        model=model, messages=messages, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            parts.append(choice.delta.content or "")
            reason = choice.finish_reason or reason
    assert "".join(parts) == expected, parts
    assert len(parts) > 10, "the answer came in one piece"
    assert reason == "stop", reason
    assert usage is not None and usage.completion_tokens == whole.usage.completion_tokens, usage

    cut = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=4)
    assert cut.choices[0].finish_reason == "length", cut
    assert expected.startswith(cut.choices[0].message.content), cut
    assert cut.usage.completion_tokens == 4, cut.usage

    stop = client.chat.completions.create(model=model, messages=messages, temperature=0, stop=["smallest"])
    assert stop.choices[0].message.content == expected.split("smallest")[0], stop
    assert stop.choices[0].finish_reason == "stop", stop

    seeded = [
        client.chat.completions.create(model=model, messages=messages, temperature=1.5, seed=7, max_tokens=24)
        for _ in range(2)
    ]
    texts = {answer.choices[0].message.content for answer in seeded}
    assert len(texts) == 1, texts

    logprobs = client.chat.completions.create(
        model=model, messages=messages, temperature=0, max_tokens=3, logprobs=True, top_logprobs=2
    )
    content = logprobs.choices[0].logprobs.content
    assert len(content) == 3 and all(len(entry.top_logprobs) == 2 for entry in content), content
    assert all(entry.logprob <= 0 for entry in content), content

    completion = client.completions.create(model=model, prompt=whole_prompt(prompt), temperature=0, max_tokens=96)
    assert completion.choices[0].text == expected, completion

    refusals = {}
    for name, arguments in {
        "unknown model": {"model": "gpt-4", "messages": messages},
        "bad temperature": {"model": model, "messages": messages, "temperature": -1},
        "no messages": {"model": model, "messages": []},
    }.items():
        try:
            client.chat.completions.create(**arguments)
        except openai.APIStatusError as error:
            refusals[name] = type(error).__name__
    assert refusals == {
        "unknown model": "NotFoundError",
        "bad temperature": "BadRequestError",
        "no messages": "BadRequestError",
    }, refusals
    print(json.dumps({"openai": openai.__version__, "checks": "passed"}))


def whole_prompt(prompt: str) -> str:
    """The chat template's rendering; the BOS token is added by the tokenizer."""
    return f"<｜User｜>{prompt}<｜Assistant｜>"


if __name__ == "__main__":
    main()
