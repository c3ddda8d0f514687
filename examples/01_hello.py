"""One prompt, one answer, and an objective: the last token within two seconds of the request's arrival."""

from example_server import server

from lmdeploy_slo.client import Client

with server() as target, Client(target) as client:
    answer = client.generate("Hello, who are you?", e2e_ms=2000, max_new_tokens=32)
    print(answer.text)
    print(f"took {answer.completion.timing.e2e_ms:.0f} ms, SLO met: {answer.completion.slo_met}")
