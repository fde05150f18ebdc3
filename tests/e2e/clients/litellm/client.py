"""litellm without its proxy: completion(), streams, batches, text completions, errors mapped to its classes."""

import asyncio
import json
import sys
from importlib.metadata import version

import litellm

litellm.telemetry = False
litellm.suppress_debug_info = True


def main() -> None:
    base_url, full_url, model, prompt, expected = sys.argv[1:6]
    messages = [{"role": "user", "content": prompt}]
    # The provider for servers of this shape that it does not know by name; "openai/" is the other spelling.
    for provider in ["hosted_vllm", "openai"]:
        common = {
            "model": f"{provider}/{model}",
            "api_base": base_url,
            "api_key": "unused",
            "num_retries": 0,
            "timeout": 120,
        }
        answer = litellm.completion(messages=messages, temperature=0, **common)
        assert answer.choices[0].message.content == expected, answer
        assert answer.choices[0].finish_reason == "stop", answer
        usage = answer.usage
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens, usage

        stream = litellm.completion(
            messages=messages, temperature=0, stream=True, stream_options={"include_usage": True}, **common
        )
        chunks = list(stream)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == expected, text
        whole = litellm.stream_chunk_builder(chunks, messages=messages)
        assert whole.usage.completion_tokens == usage.completion_tokens, whole.usage

        batch = litellm.batch_completion(messages=[messages] * 3, temperature=0, **common)
        assert [answer.choices[0].message.content for answer in batch] == [expected] * 3, batch

        cut = litellm.completion(messages=messages, temperature=0, max_tokens=4, **common)
        assert cut.choices[0].finish_reason == "length", cut

        errors(common, full_url, messages)

    text = litellm.text_completion(
        model=f"text-completion-openai/{model}",
        prompt=f"<｜User｜>{prompt}<｜Assistant｜>",
        temperature=0,
        max_tokens=96,
        api_base=base_url,
        api_key="unused",
    )
    assert text.choices[0].text == expected, text
    asyncio.run(together(common, messages, expected))
    print(json.dumps({"litellm": version("litellm"), "checks": "passed"}))


def errors(common: dict, full_url: str, messages: list) -> None:
    provider = common["model"].split("/")[0]
    cases = {
        "unknown model": (litellm.NotFoundError, {"model": f"{provider}/gpt-4"}),
        "bad top_p": (litellm.BadRequestError, {"top_p": 7}),
        "too long": (litellm.ContextWindowExceededError, {"messages": [{"role": "user", "content": "a b " * 9000}]}),
        "full router": (litellm.RateLimitError, {"api_base": full_url}),
        "too slow": (litellm.Timeout, {"timeout": 0.3, "max_tokens": 3000, "extra_body": {"ignore_eos": True}}),
    }
    for name, (wanted, change) in cases.items():
        try:
            litellm.completion(**{"messages": messages, **common, **change})
            raise AssertionError(f"{name}: no error")
        except wanted:
            pass


async def together(common: dict, messages: list, expected: str) -> None:
    asked = [litellm.acompletion(messages=messages, temperature=0, **common) for _ in range(8)]
    for answer in await asyncio.gather(*asked):
        assert answer.choices[0].message.content == expected, answer


if __name__ == "__main__":
    main()
