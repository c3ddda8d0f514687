"""Ask first: would a long answer meet its SLO now? If not, promise less instead of failing."""

from example_server import server

from lmdeploy_slo.client import Client

QUESTION = "Explain simulated annealing."

with server() as target, Client(target) as client:
    for tokens in (400, 200, 100, 50):
        forecast = client.predict(QUESTION, e2e_ms=1500, max_new_tokens=tokens, expected_output_tokens=tokens)
        expected = f"{tokens} tokens would take {forecast.predicted.e2e_ms:.0f} ms"
        if not forecast.would_meet_slo:
            print(f"{expected}: no, {forecast.reason}")
            continue
        print(f"{expected}: go")
        answer = client.generate(QUESTION, e2e_ms=1500, max_new_tokens=tokens, expected_output_tokens=tokens)
        print(f"it took {answer.completion.timing.e2e_ms:.0f} ms, SLO met: {answer.completion.slo_met}")
        break
