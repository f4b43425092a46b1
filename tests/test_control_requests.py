"""Which requests fail with an epoch, which are tried again, and which have waited for too long."""

from tpdist.control.messages import Generate, TokenOutput
from tpdist.control.requests import Requests
from tpdist.sampling_params import SamplingParams

NODE, OTHER = b"node", b"other"


def request(name: str) -> Generate:
    return Generate(request_id=name, prompt_token_ids=(1,), sampling=SamplingParams())


def running(*names: str) -> Requests:
    requests = Requests()
    for name in names:
        requests.add(request(name), NODE)
    return requests


def test_what_has_produced_something_is_lost_with_its_epoch() -> None:
    requests = running("a", "b")
    requests.delivered(TokenOutput("a", (5,)))
    assert requests.end_epoch(0) == [("a", NODE)]
    assert (requests.num_running, requests.num_waiting) == (0, 1)
    assert [each.request_id for each in requests.resume()] == ["b"]
    assert (requests.num_running, requests.num_waiting, requests.num_retried) == (1, 0, 1)


def test_log_probabilities_of_the_prompt_are_output_too() -> None:
    requests = running("a")
    requests.delivered(TokenOutput("a", (), None, (), ()))
    assert requests.end_epoch(0) == [("a", NODE)]


def test_a_request_is_tried_twice_and_no_more() -> None:
    requests = running("poison")
    assert requests.end_epoch(0) == []
    assert len(list(requests.resume())) == 1
    assert requests.end_epoch(1) == [("poison", NODE)]
    assert "poison" not in requests


def test_one_that_waits_while_a_second_epoch_fails_has_not_been_tried() -> None:
    requests = running("a")
    requests.end_epoch(0)
    assert requests.end_epoch(1) == []
    assert [each.request_id for each in requests.resume()] == ["a"]


def test_requests_resume_in_the_order_in_which_they_came() -> None:
    requests = running("a", "b")
    requests.end_epoch(0)
    requests.add_waiting(request("c"), OTHER, 1)
    assert [each.request_id for each in requests.resume()] == ["a", "b", "c"]
    assert requests.num_retried == 2


def test_those_that_wait_for_too_long_are_named_and_forgotten() -> None:
    requests = running("a")
    requests.end_epoch(10)
    requests.add_waiting(request("b"), OTHER, 15)
    assert requests.overdue(12, 5) == []
    assert requests.overdue(16, 5) == [("a", NODE)]
    assert (requests.num_waiting, requests.num_running) == (1, 0)


def test_the_last_output_and_an_abort_end_a_request() -> None:
    requests = running("a", "b")
    requests.delivered(TokenOutput("a", (5,), "stop"))
    assert requests.remove("b") == NODE
    assert requests.remove("b") is None
    assert requests.num_running == 0


def test_what_a_node_has_asked_for_is_found() -> None:
    requests = running("a", "b")
    requests.add(request("c"), OTHER)
    assert (requests.of(NODE), requests.of(OTHER)) == (["a", "b"], ["c"])
    assert requests.clear() == [("a", NODE), ("b", NODE), ("c", OTHER)]
    assert requests.num_running == 0
