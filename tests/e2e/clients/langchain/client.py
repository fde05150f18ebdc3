"""langchain-openai: chat and completion models, batches, streams, errors, giving up."""

import asyncio
import json
import sys
from importlib.metadata import version

import openai
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI


def main() -> None:
    base_url, full_url, model, prompt, expected = sys.argv[1:6]
    common = {"base_url": base_url, "api_key": "unused", "max_retries": 0, "timeout": 120}
    chat = ChatOpenAI(model=model, temperature=0, stream_usage=True, **common)

    answer = chat.invoke(prompt)
    assert answer.content == expected, answer
    assert answer.response_metadata["finish_reason"] == "stop", answer
    usage = answer.usage_metadata
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"], usage

    chunks = list(chat.stream(prompt))
    assert "".join(chunk.content for chunk in chunks) == expected, chunks
    assert len(chunks) > 10, "the answer came in one piece"
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert whole.usage_metadata["output_tokens"] == usage["output_tokens"], whole

    assert [answer.content for answer in chat.batch([prompt] * 3)] == [expected] * 3
    many = asyncio.run(chat.abatch([[SystemMessage("Be brief."), HumanMessage(prompt)]] * 2))
    assert len({answer.content for answer in many}) == 1, many

    cut = chat.bind(max_tokens=4).invoke(prompt)
    assert cut.response_metadata["finish_reason"] == "length", cut
    probable = chat.bind(logprobs=True, top_logprobs=2, max_tokens=3).invoke(prompt)
    assert len(probable.response_metadata["logprobs"]["content"]) == 3, probable
    stopped = chat.invoke(prompt, stop=["smallest"])
    assert stopped.content == expected.split("smallest")[0], stopped

    text = OpenAI(model=model, temperature=0, max_tokens=96, **common)
    raw = f"<｜User｜>{prompt}<｜Assistant｜>"
    assert text.invoke(raw) == expected
    assert [row[0].text for row in text.generate([raw, raw]).generations] == [expected] * 2
    assert "".join(text.stream(raw)) == expected

    errors = {
        "unknown model": (openai.NotFoundError, ChatOpenAI(model="gpt-4", **common)),
        "bad temperature": (openai.BadRequestError, ChatOpenAI(model=model, temperature=7, **common)),
        "full router": (openai.RateLimitError, ChatOpenAI(model=model, **{**common, "base_url": full_url})),
    }
    for name, (error, broken) in errors.items():
        try:
            broken.invoke(prompt)
            raise AssertionError(f"{name}: no error")
        except error:
            pass

    # A reader that stops early: the generator is closed, and with it the connection.
    endless = chat.bind(max_tokens=3000, extra_body={"ignore_eos": True}).stream(prompt)
    next(endless)
    endless.close()
    print(json.dumps({"langchain-openai": version("langchain-openai"), "checks": "passed"}))


if __name__ == "__main__":
    main()
