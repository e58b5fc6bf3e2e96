"""Hours of traffic in minutes: conversations, clients that leave or never read, nonsense, and a pool too small."""

import json
import random
import socket
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import psutil
import pytest
import transformers
from packaging.version import Version
from support.marks import slow
from support.serving import Server, free_port, single

from kara_hf.bundled import BUNDLED_MODEL
from kara_hf.integration.loading import LoadedModel
from kara_hf.serving.seams import LEAST_TRANSFORMERS
from kara_hf.tasks.reasoner import make_problem

if Version(transformers.__version__) < Version(LEAST_TRANSFORMERS):
    pytest.skip(f"serving needs Transformers {LEAST_TRANSFORMERS}", allow_module_level=True)

TEXT = "/v1/completions"
CLIENTS, BLOCKS = 6, 46
SHORT = 12  # tokens of the answers whose latencies are compared
NONSENSE = [
    b"",
    b"{",
    b"[]",
    b'{"prompt": 5}',
    b'{"prompt": ""}',
    b'{"prompt": "ka", "max_tokens": -1}',
    b'{"prompt": "ka", "n": 3}',
]
SETTINGS = {"retention": 0.25, "window": 16, "recent": 8, "period": 4, "conversations": 8, "memory": "1.5 MiB"}


class Traffic:
    """What clients ask of a server, and what of its answers was wrong."""

    def __init__(self, server: Server):
        self.server, self.wrong, self.counts = server, [], dict.fromkeys((200, 400, 500), 0)
        self.seconds: list[float] = []  # that short answers took, in order
        self.problems = [make_problem("trace", generated=60, seed=90_000 + number).prompt for number in range(6)]
        loaded = LoadedModel(str(BUNDLED_MODEL))
        encoded = [loaded.encode(prompt, chat=False)[0].tolist() for prompt in self.problems]
        tokens = [single(loaded.model, ids, SHORT, retention=1.0) for ids in encoded]  # before any window is sealed
        self.begin = [loaded.tokenizer.decode(answer, skip_special_tokens=True) for answer in tokens]

    def post(self, data: bytes, timeout: float = 120) -> tuple[int, str]:
        headers = {"content-type": "application/json"}
        try:
            ask = urllib.request.Request(self.server.url + TEXT, data, headers)
            with urllib.request.urlopen(ask, timeout=timeout) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def body(self, prompt: str, tokens: int, **more: object) -> bytes:
        return json.dumps({"prompt": prompt, "max_tokens": tokens, "temperature": 0} | more).encode()

    def stream(self, prompt: str, read: int) -> socket.socket:
        """A stream of which so many bytes are read."""
        data = self.body(prompt, 200, stream=True)
        client = socket.create_connection(("127.0.0.1", int(self.server.url.rpartition(":")[2])))
        head = (
            f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        client.sendall(head.encode() + data)
        if read:
            client.settimeout(60)
            client.recv(read)
        return client

    def client(self, draw: random.Random, count: int) -> None:
        """Asks `count` times, whatever comes to mind."""
        try:
            for _ in range(count):
                self.once(draw)
        except Exception as error:
            self.wrong.append(repr(error))

    def once(self, draw: random.Random) -> None:
        number, kind = draw.randrange(len(self.problems)), draw.random()
        prompt = self.problems[number]
        if kind < 0.15:
            self.note(400, *self.post(draw.choice(NONSENSE)))
        elif kind < 0.25:
            self.note(400, *self.post(self.body(prompt * 60, 4)))
        elif kind < 0.4:
            self.stream(prompt, draw.choice((0, 50, 900))).close()
        else:
            for _ in range(draw.randint(1, 4)):
                tokens, start = draw.choice((SHORT, 40, 150)), time.perf_counter()
                status, answer = self.post(self.body(prompt, tokens))
                if not self.note(200, status, answer):
                    return
                if tokens == SHORT:
                    self.seconds.append(time.perf_counter() - start)
                text = json.loads(answer)["choices"][0]["text"]
                if prompt == self.problems[number] and not text.startswith(self.begin[number]):
                    self.wrong.append(f"{self.begin[number]!r} was to come, and {text!r} came")
                prompt += " " + text + " ; ? ka >"

    def note(self, expected: int, status: int, answer: str) -> bool:
        """Counts an answer; only a trace or a conversation that outgrows the pool may be answered otherwise."""
        self.counts[status] = self.counts.get(status, 0) + 1
        if status != expected and not (expected == 200 and "give the engine more memory" in answer):
            self.wrong.append(f"{expected} was expected, and {status} came: {answer[:200]}")
        return status == expected


@pytest.mark.parametrize("requests", [slow(300), slow(5000)])
def test_nothing_is_lost_mixed_up_or_leaked(requests):
    options = [part for name, value in SETTINGS.items() for part in (f"--{name}", str(value))]
    with Server(free_port(), *options) as server:
        traffic = Traffic(server)
        silent = [traffic.stream(traffic.problems[0], 0) for _ in range(2)]
        clients = [
            threading.Thread(target=traffic.client, args=(random.Random(number), requests // CLIENTS))
            for number in range(CLIENTS)
        ]
        for client in clients:
            client.start()
        while len(traffic.seconds) < requests // 10 and any(client.is_alive() for client in clients):
            time.sleep(1)
        process = psutil.Process(server.process.pid)
        memory = process.memory_info().rss
        for client in clients:
            client.join()
        grown = process.memory_info().rss - memory
        for client in silent:
            client.close()
        assert not traffic.wrong, (traffic.wrong[:5], server.output()[-2000:])
        assert traffic.counts[200] > requests // 2 and traffic.counts[400] > requests // 8
        first, *_, last = (np.median(part) for part in np.array_split(traffic.seconds, 5))
        print(
            f"{len(traffic.seconds)} short answers: {first:.2f} s at first and {last:.2f} s at last; {grown >> 20} MiB"
        )
        assert last < 1.3 * first and grown < 64 << 20
        metrics, steps = server.metrics(), -1.0
        while metrics["kara_steps"] != steps:  # what nobody waits for any more comes to an end
            steps = metrics["kara_steps"]
            time.sleep(1)
            metrics = server.metrics()
        assert metrics["kara_found_pasts"] > 10 and metrics["kara_blocks"] == BLOCKS
        # The longest prompt that is not refused needs all blocks, and finds them.
        for words in range(BLOCKS * 16 // 4, 0, -1):
            status, answer = traffic.post(traffic.body(" ".join(["ka : 7 ;"] * words), 1))
            if status != 400:
                break
        assert status == 200, answer
        assert json.loads(answer)["usage"]["prompt_tokens"] > BLOCKS * 16 - 8
        assert server.metrics()["kara_query_bytes"] == 0
