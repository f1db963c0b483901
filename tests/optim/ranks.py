"""Processes in a gloo group for tests: started once, each call runs on the first n of them."""

import io
import multiprocessing
import tempfile
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist

ANSWER_S = 60
SILENT = ("no answer", b"")


class Ranks:
    """``ranks(n, function, *arguments)`` runs function(group, *arguments) in n processes, whose
    process group is ``group``, and returns their results; function is one of a module's."""

    def __init__(self, count, timeout=60):
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        store = f"file://{self._folder.name}/store"
        self._pipes, self._processes = [], []
        for rank in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, store, rank, count, timeout), daemon=True
            )
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def __call__(self, n, function, *arguments):
        data = io.BytesIO()
        torch.save(arguments, data)
        for pipe in self._pipes[:n]:
            pipe.send((n, function, data.getvalue()))
        results = [pipe.recv() if pipe.poll(ANSWER_S) else SILENT for pipe in self._pipes[:n]]
        errors = [f"rank {rank}: {text}" for rank, (text, _) in enumerate(results) if text]
        if errors:
            raise AssertionError("\n".join(errors))
        return [torch.load(io.BytesIO(data), weights_only=False) for _, data in results]

    def close(self):
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(5)
            process.kill()
        self._folder.cleanup()


def _serve(pipe, store, rank, count, timeout):
    torch.set_num_threads(1)
    limit = timedelta(seconds=timeout)
    start = timedelta(seconds=ANSWER_S)  # however late a process is
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=count, timeout=start)
    groups = {n: dist.new_group(range(n), timeout=limit) for n in range(1, count + 1)}
    while True:
        try:
            n, function, given = pipe.recv()
        except EOFError:
            return
        try:
            arguments = torch.load(io.BytesIO(given), weights_only=False)
            data = io.BytesIO()
            torch.save(function(groups[n], *arguments), data)
            pipe.send(("", data.getvalue()))
        except BaseException:
            pipe.send((traceback.format_exc(), b""))
