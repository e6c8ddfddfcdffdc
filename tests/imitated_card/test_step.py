import pytest
from imitated_card.runs import step_of_shape
T4={"capability": (7, 5)}
CASES={
 "qwen T4 4096": dict(shape="Qwen3-4B", lengths=(4096,), card=T4),
 "qwen 4096": dict(shape="Qwen3-4B", lengths=(4096,)),
 "qwen 4096 nockpt": dict(shape="Qwen3-4B", lengths=(4096,), gradient_checkpointing=False),
 "qwen T4 4096 nockpt": dict(shape="Qwen3-4B", lengths=(4096,), card=T4, gradient_checkpointing=False),
 "llama T4": dict(card=T4),
 "llama fp32": dict(lengths=(2048,), card=T4),
}
@pytest.mark.parametrize("case", CASES)
def test_x(tmp_path, case):
    s = step_of_shape(tmp_path, **CASES[case])
    print("@@", case, "peak", round(s.peak/2**30,3), "plan", round(s.planned_peak/2**30,3), round(s.planned_peak/s.peak,3), "scoring", round(s.scoring/2**30,3), round(s.planned_scoring/2**30,3), {k:v for k,v in s.counts.items()}, {k: round(v/2**30,3) for k,v in s.planned.items()})
