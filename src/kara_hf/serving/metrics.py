"""What an engine with Kara did and holds."""

from dataclasses import asdict, dataclass


@dataclass
class ServingMetrics:
    """Counters since the engine began, and what is there now.

    Attributes:
        steps: forward passes of the engine.
        running, waiting: requests in the last step, and those that wait.
        running_sum: requests of all steps together; over `steps` it is the mean.
        preemptions: requests that lost their blocks and were put back to wait.
        refused: requests that could not be computed and never began.
        failed: requests that ended with an error of ours.
        compressions: requests times how often each was compressed.
        windows: windows sealed.
        prompts: prompts compressed.
        whole_prompts: prompts that were to be, and stayed whole: no block would have been given back, or there was no
            room for their queries.
        found_pasts, found_tokens: requests that began with the past of another one, and tokens that it stood for.
        computed_tokens: tokens of all steps, of prompts and of answers.
        pasts: of requests that have ended, there to be found.
        evicted_tokens: tokens dropped, in each layer and head.
        freed_blocks: blocks given back by compressing.
        blocks, used_blocks: blocks of the pool's full attention layers, and those in use, by prefixes, pasts and
            queries too.
        query_bytes: of blocks with queries of open windows and of prompts, which are among the used ones.
        peak_query_bytes: the most of it.
    """

    steps: int = 0
    running: int = 0
    waiting: int = 0
    running_sum: int = 0
    preemptions: int = 0
    refused: int = 0
    failed: int = 0
    compressions: int = 0
    windows: int = 0
    prompts: int = 0
    whole_prompts: int = 0
    found_pasts: int = 0
    found_tokens: int = 0
    computed_tokens: int = 0
    pasts: int = 0
    evicted_tokens: int = 0
    freed_blocks: int = 0
    blocks: int = 0
    used_blocks: int = 0
    query_bytes: int = 0
    peak_query_bytes: int = 0

    @property
    def mean_running(self) -> float:
        """Requests in a step, on average; 0 without any."""
        return self.running_sum / self.steps if self.steps else 0.0

    def to_prometheus(self) -> str:
        """In the text format of Prometheus, every name with ``kara_`` before it."""
        now = {"running", "waiting", "pasts", "blocks", "used_blocks", "query_bytes", "peak_query_bytes"}
        lines = []
        for name, value in asdict(self).items():
            lines += [f"# TYPE kara_{name} {'gauge' if name in now else 'counter'}", f"kara_{name} {value}"]
        return "\n".join(lines) + "\n"
