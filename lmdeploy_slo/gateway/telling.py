"""From what the runtime remembers to messages of the protocol: the load of the server, and why a request waited."""

from __future__ import annotations

from lmdeploy_slo.core.plan import PlanQuality
from lmdeploy_slo.core.request import EndStatus, PriorityClass
from lmdeploy_slo.gateway.encoding import to_prediction, to_slo, to_timing
from lmdeploy_slo.prediction.calibration import CalibrationStatistics
from lmdeploy_slo.runtime.explanation import Explanation, Place, Queued, RequestState, Sent
from lmdeploy_slo.runtime.last_minute import TaskCounts
from lmdeploy_slo.runtime.statistics import ReplicaLoad, RuntimeLoad
from lmdeploy_slo.v1 import inference_pb2 as pb

_STATES = {
    RequestState.WAITING: pb.REQUEST_STATE_WAITING,
    RequestState.RUNNING: pb.REQUEST_STATE_RUNNING,
    RequestState.ENDED: pb.REQUEST_STATE_ENDED,
}
_CLASSES = {
    PriorityClass.BULK: pb.PRIORITY_CLASS_BULK,
    PriorityClass.DEFAULT: pb.PRIORITY_CLASS_DEFAULT,
    PriorityClass.INTERACTIVE: pb.PRIORITY_CLASS_INTERACTIVE,
    PriorityClass.SYSTEM: pb.PRIORITY_CLASS_SYSTEM,
}


def to_load(load: RuntimeLoad) -> pb.GetLoadResponse:
    planner = load.planner
    return pb.GetLoadResponse(
        waiting=load.waiting,
        in_flight=load.in_flight,
        waiting_prompt_tokens=load.waiting_prompt_tokens,
        kv_usage=load.kv_usage,
        finished=load.ended[EndStatus.FINISHED],
        rejected=load.ended[EndStatus.REJECTED],
        timed_out=load.ended[EndStatus.TIMED_OUT],
        failed=load.ended[EndStatus.FAILED],
        cancelled=load.ended[EndStatus.CANCELLED],
        with_slo=load.with_slo,
        slo_met=load.slo_met,
        plans=planner.plans,
        last_plan_ms=_ms(planner.last_plan_s),
        mean_plan_ms=_ms(planner.mean_plan_s),
        draining=load.draining,
        failed_plans=planner.failures,
        max_in_flight=load.max_in_flight,
        oldest_wait_ms=_ms(load.oldest_wait_s),
        output_tokens=load.output_tokens,
        last_plan=None if load.last_plan is None else _to_quality(load.last_plan.plan.quality),
        step_forecasts=_to_step_forecasts(load.calibration),
        last_minute=[_to_task(task, counts) for task, counts in load.last_minute.items()],
        refused=load.refused,
        retried=load.retried,
        resumed=load.resumed,
        replicas=[_to_replica(replica) for replica in load.replicas],
        predicted_attainment=load.predicted_attainment,
    )


def _to_replica(replica: ReplicaLoad) -> pb.ReplicaLoad:
    return pb.ReplicaLoad(
        instance=replica.name,
        up=replica.up,
        draining=replica.draining,
        waiting=replica.waiting,
        in_flight=replica.in_flight,
        max_in_flight=replica.max_in_flight,
        waiting_prompt_tokens=replica.waiting_prompt_tokens,
        kv_usage=replica.kv_usage,
        output_tokens=replica.output_tokens,
        engine_restarts=replica.engine_restarts,
        step_forecasts=_to_step_forecasts(replica.calibration),
    )


def _to_step_forecasts(calibration: CalibrationStatistics) -> pb.StepForecasts:
    return pb.StepForecasts(
        relative_error=calibration.relative_error,
        slowness=calibration.slowness,
        drifting=calibration.drifting,
        windows=calibration.windows,
    )


def to_explanation(told: Explanation) -> pb.ExplainResponse:
    spec, ended = told.spec, told.state is RequestState.ENDED
    message = pb.ExplainResponse(
        request_id=spec.request_id,
        state=_STATES[told.state],
        reason=told.reason,
        task_type=spec.task_type,
        priority_class=_CLASSES[spec.priority_class],
        prompt_tokens=spec.prompt_tokens,
        output_tokens=told.timing.output_tokens if ended else None,
        slo=to_slo(spec.slo),
        predicted=to_prediction(told.predicted),
        timing=to_timing(told.timing),
        arrival_position=told.arrival_position,
        wait=pb.WaitTime(
            total_ms=told.waited_s * 1e3,
            planning_ms=told.planning_s * 1e3,
            engine_full_ms=told.full_s * 1e3,
            held_back_ms=told.held_s * 1e3,
        ),
        places=[_to_place(place) for place in told.places],
        sent_before=_to_queued(told.queued),
        dearest=[_to_sent(sent) for sent in told.before],
        sent=None if told.sent is None else _to_sent(told.sent),
        complete=told.complete,
        moves=told.moves,
    )
    if told.slo_met is not None:
        message.slo_met = told.slo_met
    return message


def _to_quality(quality: PlanQuality) -> pb.PlanQuality:
    return pb.PlanQuality(
        start=quality.start,
        start_score=quality.start_score,
        score=quality.score,
        evaluations=quality.evaluations,
        engine_second_price=quality.price_s,
    )


def _to_task(task: str, counts: TaskCounts) -> pb.TaskLoad:
    return pb.TaskLoad(
        task=task,
        requests=counts.requests,
        finished=counts.finished,
        with_slo=counts.with_slo,
        slo_met=counts.slo_met,
        broke_ttft=counts.broke_ttft,
        broke_tpot=counts.broke_tpot,
        broke_e2e=counts.broke_e2e,
        unfinished=counts.unfinished,
        prompt_tokens=counts.prompt_tokens,
        output_tokens=counts.output_tokens,
        mean_ttft_ms=counts.ttft_s * 1e3 / counts.finished if counts.finished else None,
        mean_tpot_ms=counts.tpot_s * 1e3 / counts.with_tpot if counts.with_tpot else None,
    )


def _to_place(place: Place) -> pb.QueuePlace:
    return pb.QueuePlace(
        at_ms=place.at_s * 1e3,
        position=place.position,
        waiting=place.waiting,
        in_flight=place.in_flight,
        sent=place.sent,
        spare_ms=_ms(place.spare_s),
    )


def _to_queued(queued: Queued) -> pb.SentBefore:
    return pb.SentBefore(
        requests=queued.requests,
        overtook=queued.overtook,
        prompt_tokens=queued.prompt_tokens,
        engine_ms=queued.engine_s * 1e3,
        cost=queued.cost,
    )


def _to_sent(sent: Sent) -> pb.SentRequest:
    return pb.SentRequest(
        at_ms=sent.at_s * 1e3,
        arrived_ms=sent.arrived_s * 1e3,
        rank=sent.rank,
        priority_class=_CLASSES[sent.priority_class],
        prompt_tokens=sent.prompt_tokens,
        output_tokens=sent.output_tokens,
        engine_ms=sent.engine_s * 1e3,
        spare_ms=_ms(sent.spare_s),
        cost=sent.cost,
    )


def _ms(duration_s: float | None) -> float | None:
    return None if duration_s is None else duration_s * 1e3
