"""How risky a card payment is: a model of one's own in plain Python, with numpy.

Its signature is in model.yaml beside it. This file stands alone: what it needs beyond itself is an installed package.
"""

import numpy as np

from inferbus.models import Model


class PaymentRisk(Model):
    """Large amounts are riskier, and some countries more than others."""

    def load(self) -> None:
        """Called once; weights would be read here, with paths that start at `__file__`."""
        self.countries = {"DE": 0.01, "FR": 0.02, "US": 0.05}

    def predict(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """A whole batch: `amount` float64 [n], `country` str [n] in; `risk` float32 [n], `review` bool [n] out."""
        country = np.array([self.countries.get(code, 0.2) for code in inputs["country"]])
        risk = 1 - (1 - country) * np.exp(-np.maximum(inputs["amount"], 0) / 10_000)
        return {"risk": risk.astype(np.float32), "review": risk > 0.3}
