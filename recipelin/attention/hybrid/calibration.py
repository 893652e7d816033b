"""The closed form of c_h, the log-scale of the `absolute` join."""

from typing import TYPE_CHECKING, Any

import torch

from recipelin_kernels import log_scale_closed_form

from ..calibration import Calibration
from ..captured import Captured

if TYPE_CHECKING:
    from .module import HybridAttention


class LogScaleCalibration(Calibration):
    """c_h = mean over rows of (teacher's log-mass outside the window - linear log-mass there): facts/pocket.md §F."""

    def __init__(self, form: "HybridAttention") -> None:
        self.form = form
        self.total = torch.zeros(form.architecture.num_attention_heads, dtype=torch.float64)
        self.rows = 0

    @torch.no_grad()
    def add(self, captured: Captured) -> None:
        """Raises ValueError without the teacher's log-sum-exp."""
        if captured.lse is None:
            raise ValueError("log_scale: needs the teacher's log-sum-exp, which only a recorder gets")
        options = self.form.options(self.form.state, captured.q.shape[2])
        total, rows = log_scale_closed_form(
            captured.q,
            captured.k,
            self.form.feature_map_q(captured.q),
            self.form.feature_map_k(captured.k),
            captured.lse,
            **{name: options[name] for name in ("window", "shape", "sinks", "cover", "reach", "signed")},
            scale=self.form.scaling,
            key_mask=captured.key_mask,
            segment_ids=captured.segment_ids,
            teacher_window=self.form.own_window,
        )
        self.total += total.double().cpu()
        self.rows += rows

    @torch.no_grad()
    def finish(self) -> dict[str, Any]:
        """Set c_h. Raises ValueError if no row had a key outside the window."""
        if not self.rows:
            raise ValueError("log_scale: no row has a key outside the window; calibrate on longer rows")
        c = self.total / self.rows
        self.form.log_scale.c.copy_(c.to(self.form.log_scale.c))
        return {"c": [round(x, 4) for x in c.tolist()], "rows": self.rows}
