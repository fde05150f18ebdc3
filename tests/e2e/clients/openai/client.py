"""OpenAI's own client: completions, chat, streams, errors by class, cancellation, batches, concurrency."""

import asyncio
import json
import sys

import openai


def main() -> None:
    base_url, full_url, model, prompt, expected = sys.argv[1:6]
    client = openai.OpenAI(base_url=base_url, api_key="unused", max_retries=0, timeout=120)
    messages = [{"role": "user", "content": prompt}]

    models = [entry.id for entry in client.models.list()]
    assert models == [model], models
    assert client.models.retrieve(model).id == model

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

    # The helper that collects a stream reads more of each chunk than a loop does.
    with client.chat.completions.stream(model=model, messages=messages, temperature=0) as events:
        deltas = [event.delta for event in events if event.type == "content.delta"]
        final = events.get_final_completion()
    assert "".join(deltas) == expected, deltas
    assert final.choices[0].message.content == expected, final

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

    completions(client, model, prompt, expected)
    errors(client, full_url, model, messages)
    cancellation(client, model, messages)
    asyncio.run(together(base_url, model, messages, expected))
    print(json.dumps({"openai": openai.__version__, "checks": "passed"}))


def completions(client: openai.OpenAI, model: str, prompt: str, expected: str) -> None:
    whole = whole_prompt(prompt)
    one = client.completions.create(model=model, prompt=whole, temperature=0, max_tokens=96)
    assert one.choices[0].text == expected, one
    batch = client.completions.create(model=model, prompt=[whole, "x"], temperature=0, max_tokens=96, n=2)
    assert [choice.index for choice in batch.choices] == [0, 1, 2, 3], batch
    assert [choice.text for choice in batch.choices[:2]] == [expected, expected], batch
    streamed = client.completions.create(model=model, prompt=whole, temperature=0, max_tokens=96, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == expected


def errors(client: openai.OpenAI, full_url: str, model: str, messages: list) -> None:
    refusals = {}
    for name, arguments in {
        "unknown model": {"model": "gpt-4", "messages": messages},
        "bad temperature": {"model": model, "messages": messages, "temperature": -1},
        "no messages": {"model": model, "messages": []},
        "stream of a bad request": {"model": model, "messages": messages, "top_p": 7, "stream": True},
    }.items():
        try:
            client.chat.completions.create(**arguments)
        except openai.APIStatusError as error:
            assert error.body["message"] and error.request_id, (name, error.body, error.request_id)
            refusals[name] = (type(error).__name__, error.param)
    assert refusals == {
        "unknown model": ("NotFoundError", "model"),
        "bad temperature": ("BadRequestError", "temperature"),
        "no messages": ("BadRequestError", "messages"),
        "stream of a bad request": ("BadRequestError", "top_p"),
    }, refusals
    full = client.with_options(base_url=full_url)
    try:
        full.chat.completions.create(model=model, messages=messages)
        raise AssertionError("a full router takes no request")
    except openai.RateLimitError as error:
        assert int(error.response.headers["retry-after"]) > 0, error.response.headers


def cancellation(client: openai.OpenAI, model: str, messages: list) -> None:
    """A stream that is closed after its first chunk, and a request that the client gives up."""
    endless = {"model": model, "messages": messages, "max_tokens": 3000, "extra_body": {"ignore_eos": True}}
    stream = client.chat.completions.create(**endless, stream=True)
    next(iter(stream))
    stream.close()
    try:
        client.with_options(timeout=0.3).chat.completions.create(**endless)
        raise AssertionError("3000 tokens take longer")
    except openai.APITimeoutError:
        pass


async def together(base_url: str, model: str, messages: list, expected: str) -> None:
    async with openai.AsyncOpenAI(base_url=base_url, api_key="unused", max_retries=0, timeout=120) as client:
        asked = [
            client.chat.completions.create(model=model, messages=messages, temperature=0) for _ in range(8)
        ]
        for answer in await asyncio.gather(*asked):
            assert answer.choices[0].message.content == expected, answer


def whole_prompt(prompt: str) -> str:
    """The chat template's rendering; the BOS token is added by the tokenizer."""
    return f"<｜User｜>{prompt}<｜Assistant｜>"


if __name__ == "__main__":
    main()
