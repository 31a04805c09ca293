"""Waits of the driver: what happens meanwhile is shown, and a wish to stop is heard."""

from typing import Any

from kdscale.display import Display
from kdscale.metrics import StepMetrics
from kdscale.start import Job, Stopped, Teacher
from kdscale.student.service import StudentGroup

POLL_S = 0.25


def show(events: list[dict[str, Any]], display: Display) -> None:
    for event in events:
        match event["kind"]:
            case "step":
                display.step(StepMetrics(**event["metrics"]))
            case "phase" | "leaving" | "recorded":
                display.phase(event["phase"])
            case "checkpoint":
                display.phase(event["text"])


def look(job: Job, teacher: Teacher) -> None:
    """What a wait for parts that start does now and then. Raises: the teacher's fault, Stopped."""
    show(teacher.events(), job.display)
    if job.stop.is_set():
        raise Stopped("while its parts were starting")


def ready(job: Job, teacher: Teacher, students: StudentGroup | None) -> dict[str, Any]:
    """Wait until the teacher serves and every student rank, if any, is built; returns rank 0's facts. The parts know their
    limits. Raises: KdscaleError, Stopped."""
    facts: dict[str, Any] | None = {} if students is None else None
    while facts is None or not teacher.serves:
        look(job, teacher)
        if students is not None:
            show(students.events(), job.display)
            facts = students.built()
        job.stop.wait(POLL_S)
    return facts
