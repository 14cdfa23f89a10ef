"""Load on one or more servers with OpenAI's API, in turns.

    python experiments/benchmarks/serve_load.py --url=http://127.0.0.1:8000,http://127.0.0.1:8001
        [--clients=1,8,32] [--seconds=20] [--warm=0] [--rounds=1] [--kill=0] [--pid=123,124]

Every client asks for one completion after another (greedy, prompts and answers of mixed lengths)
and reads it as a stream. For each server and number of clients: tokens/s in all, time to the first
token and between the tokens of a text (an event with several tokens is divided among them), what
was refused with 429 (asked again after a moment), lost or unlike the answer that the same request
has alone, and of the process --pid its memory and its processor time a token, which says something
on a busy machine too. --kill is the share of requests whose client goes away in the middle; --warm
is how many seconds each load runs before anything is counted, so that all programs are compiled.
All clients are in this process; its own processor time is printed with the rest.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import random
import statistics
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

TEXTS = ("The history of the city begins", "Once upon a time, a fox and a crow", "Water boils when")


@dataclasses.dataclass
class Answer:
    status: int
    text: str = ""
    tokens: int = 0
    first: float = 0.0  # seconds to the first token
    gaps: list[float] = dataclasses.field(default_factory=list)  # seconds between tokens
    whole: bool = False  # its end was received


@dataclasses.dataclass
class Load:
    """What some clients saw in some time."""

    answers: list[Answer] = dataclasses.field(default_factory=list)
    refused: int = 0
    killed: int = 0
    lost: int = 0
    wrong: int = 0
    seconds: float = 0.0


def make_bodies(count: int = 12, *, seed: int = 0) -> list[dict]:
    """Requests of mixed lengths."""
    chance = random.Random(seed)
    bodies = []
    for i in range(count):
        prompt = " ".join([TEXTS[i % len(TEXTS)]] * chance.choice([1, 4, 16]))
        bodies.append({"prompt": prompt, "max_tokens": chance.choice([16, 48, 96])})
    return bodies


async def ask(url: str, body: dict, *, leave_after: int = 0) -> Answer:
    """Streams one completion; with `leave_after` it hangs up after so many events."""
    place = urlsplit(url)
    settings = {"temperature": 0, "seed": 0, "stream": True}
    settings |= {"stream_options": {"include_usage": True}}  # an event may hold several tokens
    content = json.dumps(settings | body).encode()
    reader, writer = await asyncio.open_connection(place.hostname, place.port, limit=1 << 24)
    try:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {place.netloc}\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        start = last = time.perf_counter()
        writer.write(head.encode() + content)
        status = (await reader.readline()).split()
        answer = Answer(int(status[1]) if len(status) > 1 else 0)
        events = 0
        while line := await reader.readline():
            if line.startswith(b"data: [DONE]"):
                answer.whole = True
            if not line.startswith(b"data: {"):
                continue
            data, now = json.loads(line[6:]), time.perf_counter()
            if usage := data.get("usage"):
                answer.tokens = usage["completion_tokens"]
            if not data.get("choices"):
                continue
            events += 1
            answer.text += data["choices"][0].get("text") or ""
            answer.first = answer.first or now - start
            if events > 1:
                answer.gaps.append(now - last)
            last = now
            if events == leave_after:
                return answer
        answer.tokens = answer.tokens or events
        return answer
    finally:
        writer.close()


async def load(
    url: str, bodies: list[dict], alone: list[str], *, clients: int, seconds: float, kill: float = 0
) -> Load:
    """`clients` at once for so long. `alone`: the texts that the bodies have alone."""
    result, begin = Load(), time.perf_counter()

    async def client(number: int) -> None:
        chance = random.Random(number)
        while time.perf_counter() - begin < seconds:
            which = chance.randrange(len(bodies))
            leave = chance.randint(1, 4) if chance.random() < kill else 0
            try:
                answer = await ask(url, bodies[which], leave_after=leave)
            except (OSError, ValueError, asyncio.IncompleteReadError):
                result.lost += 1
                continue
            if answer.status == 429:
                result.refused += 1
                await asyncio.sleep(0.2 + 0.2 * chance.random())
            elif leave and not answer.whole:
                result.killed += 1
            elif answer.status != 200 or not answer.whole:
                result.lost += 1
            else:
                result.wrong += answer.text != alone[which]
                result.answers.append(answer)

    await asyncio.gather(*(client(i) for i in range(clients)))
    result.seconds = time.perf_counter() - begin
    return result


def describe(result: Load) -> str:
    answers = result.answers
    first = [1e3 * a.first for a in answers]
    per_token = []
    for a in answers:
        per_token += [1e3 * gap * len(a.gaps) / max(a.tokens - 1, 1) for gap in a.gaps]
    rate = sum(a.tokens for a in answers) / result.seconds
    text = f"{rate:.0f} tokens/s, {len(answers)} texts, first token {_percentiles(first)} ms, "
    text += f"between tokens {_percentiles(per_token)} ms, {result.refused} times 429"
    return text + f", {result.killed} killed, {result.lost} lost, {result.wrong} unlike alone"


def _percentiles(values: list[float]) -> str:
    """Median and 99th percentile."""
    if len(values) < 2:
        return "-"
    return f"{statistics.median(values):.0f} / {statistics.quantiles(values, n=100)[98]:.0f}"


def resident_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def run(args: dict[str, str]) -> None:
    urls = args["url"].split(",")
    pids = [int(pid) for pid in args["pid"].split(",")] if "pid" in args else []
    bodies, counts = make_bodies(), [*map(int, args.get("clients", "1,8,32").split(","))]
    alone = {url: [(await ask(url, body)).text for body in bodies] for url in urls}
    if warm := float(args.get("warm", 0)):
        for clients in counts:
            for url in urls:
                await load(url, bodies, alone[url], clients=clients, seconds=warm)
    for _ in range(int(args.get("rounds", 1))):
        for clients in counts:
            for i, url in enumerate(urls):
                busy = time.process_time()
                server_busy = processor_seconds(pids[i]) if pids else 0.0
                kill, seconds = float(args.get("kill", 0)), float(args.get("seconds", 20))
                result = await load(
                    url, bodies, alone[url], clients=clients, seconds=seconds, kill=kill
                )
                own = (time.process_time() - busy) / result.seconds
                print(f"{url} {clients} clients: {describe(result)}; ", end="")
                if pids:
                    tokens = max(sum(a.tokens for a in result.answers), 1)
                    milliseconds = 1e3 * (processor_seconds(pids[i]) - server_busy) / tokens
                    print(
                        f"{resident_mib(pids[i]):.0f} MiB, {milliseconds:.1f} core ms a token; ",
                        end="",
                    )
                print(f"clients took {100 * own:.0f} % of a core", flush=True)


if __name__ == "__main__":
    asyncio.run(run(dict(arg.lstrip("-").split("=", 1) for arg in sys.argv[1:])))
