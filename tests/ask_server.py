"""Runs `python -m gptjax.serve` with the flags given here until it has answered, then stops it.

What a command of the documentation that never ends by itself is tested with: the page comes, a
completion comes, and SIGTERM ends it with 0.
"""

import json
import re
import signal
import subprocess
import sys
import threading
import urllib.request

flags = [flag for flag in sys.argv[1:] if not flag.startswith("--port")]
server = subprocess.Popen(
    [sys.executable, "-m", "gptjax.serve", *flags, "--port=0"], stderr=subprocess.PIPE, text=True
)
stopper = threading.Timer(300, server.kill)
stopper.daemon = True
stopper.start()
said = []
for line in server.stderr:
    said.append(line)
    if match := re.search(r"at (http://\S+)", line):
        break
else:
    sys.exit("".join(said))
address = match[1]
page = urllib.request.urlopen(address).read()
assert b"<html" in page, page[:200]
(model, *_) = json.load(urllib.request.urlopen(f"{address}/v1/models"))["data"]
body = json.dumps({"model": model["id"], "prompt": "The people", "max_tokens": 4}).encode()
request = urllib.request.Request(f"{address}/v1/completions", body)
request.add_header("Content-Type", "application/json")
answer = json.load(urllib.request.urlopen(request, timeout=240))
assert answer["usage"]["completion_tokens"] == 4, answer
server.send_signal(signal.SIGTERM)
_, rest = server.communicate()
sys.exit(server.returncode and f"the server ended with {server.returncode}\n{rest}")
