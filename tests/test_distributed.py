"""What one process knows comes to all by their main memory, however long it takes."""

import subprocess
import sys

from forked import environment
from unidpo.run import launch

TALK = """
import time
from datetime import timedelta

import torch.distributed as dist
from accelerate import PartialState

PartialState(cpu=True, timeout=timedelta(seconds=1))

import unidpo.distributed as ours

groups = []
plain = dist.broadcast_object_list
dist.broadcast_object_list = lambda *given, group, **more: groups.append(group) or plain(*given, group=group, **more)


def check():
    time.sleep(3)  # longer than the processes' own group waits
    return b"image"


found = [ours.on_main(check)]
ours.wait_for_all()
found += ours.gather([f"of {ours.rank()}"])
(group,) = groups
print(found, dist.get_backend(group), group is dist.group.WORLD)
"""


def test_the_others_wait_for_the_main_process_and_nothing_lies_on_a_device():
    port = str(launch.free_port())
    running = [
        subprocess.Popen(
            [sys.executable, "-c", TALK],
            env=environment() | launch.environment(rank, 2, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in running:
        said, wrong = process.communicate(timeout=120)
        assert said == "[b'image', 'of 0', 'of 1'] gloo False\n", wrong
