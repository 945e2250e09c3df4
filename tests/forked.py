"""Many runs of the command for the price of one import: a process that has imported everything forks them.

As a script it is that process: a line of JSON comes in, a run of one or more processes begins, its pids go out.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path


class Forked:
    """Starts runs of `unidpo` and waits for them."""

    def __init__(self):
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
        )

    def start(self, *arguments, log, ranks=1, env=None):
        """Begin `unidpo` with these arguments in so many processes that train together; returns their pids."""
        self._say({"arguments": [str(a) for a in arguments], "log": str(log), "ranks": ranks, "env": env or {}})
        return json.loads(self._server.stdout.readline())

    def wait(self, pids):
        """Exit codes, negative for a signal."""
        self._say({"wait": pids})
        return json.loads(self._server.stdout.readline())

    def run(self, *arguments, log, ranks=1, env=None):
        return self.wait(self.start(*arguments, log=log, ranks=ranks, env=env))

    def close(self):
        with self._server:
            self._server.stdin.close()

    def _say(self, value):
        self._server.stdin.write(json.dumps(value) + "\n")
        self._server.stdin.flush()


def environment():
    return dict(os.environ) | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}


def serve():
    from deepspeed.comm.torch import build_shm_op

    import unidpo.cli
    import unidpo.run.launch
    import unidpo.run.train

    # DeepSpeed compiles this for its first run on a CPU; two processes would wait for each other.
    with contextlib.redirect_stdout(sys.stderr):
        build_shm_op()
    for line in sys.stdin:
        asked = json.loads(line)
        if "wait" in asked:
            codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in asked["wait"]]
            _answer(codes)
            continue
        port = str(unidpo.run.launch.free_port())
        pids = []
        for rank in range(asked["ranks"]):
            pid = os.fork()
            if pid == 0:
                os.environ.update(asked["env"])
                if "FSDP_ON_A_CPU" in asked["env"]:
                    _shard_on_a_cpu()
                if asked["ranks"] > 1:
                    os.environ.update(unidpo.run.launch.environment(rank, asked["ranks"], port))
                _become_the_command(asked["arguments"], f"{asked['log']}.{rank}")
            pids.append(pid)
        _answer(pids)


def _shard_on_a_cpu():
    """accelerate shards on accelerators alone, and takes DDP on a CPU without a word; torch can, by gloo."""
    from accelerate.state import AcceleratorState, DistributedType

    begin = AcceleratorState.__init__

    def begin_and_shard(self, *args, fsdp_plugin=None, **options):
        begin(self, *args, fsdp_plugin=fsdp_plugin, **options)
        # Made anew without the plugin, it would forget again.
        if plugin := fsdp_plugin or vars(self).get("fsdp_plugin"):
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin

    AcceleratorState.__init__ = begin_and_shard


def _answer(value):
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def _become_the_command(arguments, log):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = ["unidpo", *arguments]
    code = 0
    try:
        sys.modules["unidpo.cli"].main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        code = 70
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    serve()
