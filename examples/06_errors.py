"""What can go wrong, as exceptions: wrong fields, a full queue, a deadline, an abort."""

from example_server import server

from lmdeploy_slo.client import NO_RETRY, Client, RetryPolicy
from lmdeploy_slo.errors import Cancelled, DeadlineExceeded, InvalidRequest, QueueFull

with server("--max-batch-size", "1", "--max-queued-requests", "1") as target:
    with Client(target, retry=NO_RETRY) as client:
        try:
            client.generate("Hi", temperature=9.0, e2e_ms=-1)
        except InvalidRequest as error:
            for violation in error.violations:
                print(f"wrong field: {violation.field} {violation.description}")

        try:
            client.generate("Hi", max_new_tokens=10_000, ignore_eos=True, timeout_s=0.2)
        except DeadlineExceeded:
            print("too late: the server stopped working on it")

        # One request runs, one waits, and there is no place for a third.
        running = client.stream("Hi", max_new_tokens=10_000, ignore_eos=True)
        next(running)
        waiting = client.stream("Hi", request_id="the-second", max_new_tokens=10_000, ignore_eos=True)
        while client.load().waiting == 0:
            pass
        try:
            client.generate("Hi")
        except QueueFull as error:
            print(f"no place: {error}; try again in {error.retry_after_s} s")

        client.abort("the-second")
        try:
            next(waiting)
        except Cancelled:
            print("aborted: it left the queue")
        running.close()

    # A client repeats what was turned away for a moment, as often and as patiently as it is told.
    with Client(target, retry=RetryPolicy(max_attempts=8, longest_wait_s=5.0)) as patient:
        print(f"at last: {patient.generate('Hi', max_new_tokens=8).completion.usage.output_tokens} tokens")
