#!/usr/bin/env bash
# litellm maps a server's 400 with OpenAI's code `context_length_exceeded` to ContextWindowExceededError, on which its
# `context_window_fallbacks` act, only if the JSON of the body has a space after the colon: it looks for the text
# `"code": "context_length_exceeded"`. The same object written without spaces, which means the same and is what most JSON
# writers send, becomes a plain BadRequestError and no fallback. The status, the type, the code and the message are equal.
#
# Seen with litellm 1.110.2 (PyPI), provider hosted_vllm, Python 3.11, Linux x86-64, 2026-11-28:
#   {"code": "context_length_exceeded"} -> ContextWindowExceededError
#   {"code":"context_length_exceeded"} -> BadRequestError
# Needs Python 3.10 or later; half a GB of packages.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -q litellm==1.110.2
cat > ask.py <<'PYTHON'
import http.server
import json
import threading

import litellm

litellm.suppress_debug_info = True
error = {
    "message": "there are too many tokens",
    "type": "invalid_request_error",
    "param": "messages",
    "code": "context_length_exceeded",
}


def serve(body: bytes) -> int:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(400)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server.server_port


for separators in [(", ", ": "), (",", ":")]:
    body = json.dumps({"error": error}, separators=separators).encode()
    try:
        litellm.completion(
            model="hosted_vllm/any",
            api_base=f"http://127.0.0.1:{serve(body)}/v1",
            api_key="unused",
            num_retries=0,
            messages=[{"role": "user", "content": "x"}],
        )
    except Exception as raised:
        code = json.dumps({"code": error["code"]}, separators=separators)
        print(f"{code} -> {type(raised).__name__}")
PYTHON
# Its table of prices comes with the package.
LITELLM_LOCAL_MODEL_COST_MAP=True venv/bin/python ask.py | tee seen
diff - seen <<'WANTED'
{"code": "context_length_exceeded"} -> ContextWindowExceededError
{"code":"context_length_exceeded"} -> BadRequestError
WANTED
