"""What each of two watched processes does in `test_watchdog`: PORT INDEX VICTIM HOW SECONDS."""

import os
import signal
import sys
import time

from m2mkd_jax.parallel import cluster, process, watchdog


def main(port: str, index: str, victim: str, how: str, seconds: str) -> int:
    os.environ |= {
        "M2MKD_COORDINATOR": f"localhost:{port}",
        "M2MKD_PROCESSES": "2",
        "M2MKD_PROCESS": index,
    }
    cluster.start_distributed()
    watchdog.start(float(seconds))
    process.barrier("begin")  # communicators are there
    process.reached("step 7 of pt")
    time.sleep(1)  # for a beat
    if index == victim:
        if how == "sleep":  # its threads go on
            time.sleep(100)
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[how])
    try:
        process.barrier("never")
    except Exception as error:
        return process.fail(f"m2mkd_jax: {watchdog.blame() or error}", watchdog.LOST)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
