"""Floor 4: what calibration measures. One page per measure: `observe(x, …) -> dict[str, Tensor]`, summed by the driver."""
