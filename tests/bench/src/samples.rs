//! Latencies of one run, and what is said of them.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// What is kept of a run.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(crate) struct Summary {
    pub(crate) count: u64,
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
    pub(crate) rps: f64,
}

impl Summary {
    /// Exact percentiles by nearest rank: a run has some 10⁵ samples, so they are simply all kept and sorted.
    pub(crate) fn of(mut latencies: Vec<Duration>, took: Duration) -> Self {
        latencies.sort_unstable();
        Self {
            count: latencies.len() as u64,
            p50_us: micros(rank(&latencies, 50)),
            p99_us: micros(rank(&latencies, 99)),
            rps: latencies.len() as f64 / took.as_secs_f64(),
        }
    }

    /// Each figure's median over the rounds.
    pub(crate) fn median(rounds: &[Self]) -> Self {
        Self {
            count: rounds.iter().map(|round| round.count).sum(),
            p50_us: median(rounds.iter().map(|round| round.p50_us)),
            p99_us: median(rounds.iter().map(|round| round.p99_us)),
            rps: median(rounds.iter().map(|round| round.rps)),
        }
    }
}

/// The median; of an even number the mean of the middle two. NaN of nothing.
pub(crate) fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_unstable_by(f64::total_cmp);
    let half = values.len() / 2;
    match values.len() {
        0 => f64::NAN,
        length if length % 2 == 0 => f64::midpoint(values[half - 1], values[half]),
        _ => values[half],
    }
}

fn rank(sorted: &[Duration], percent: usize) -> Duration {
    let position = (sorted.len() * percent).div_ceil(100);
    sorted
        .get(position.saturating_sub(1))
        .copied()
        .unwrap_or_default()
}

fn micros(duration: Duration) -> f64 {
    duration.as_nanos() as f64 / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_exact_whatever_the_order() {
        let latencies = (1..=200).rev().map(Duration::from_micros).collect();
        let summary = Summary::of(latencies, Duration::from_secs(2));
        assert_eq!(
            summary,
            Summary {
                count: 200,
                p50_us: 100.0,
                p99_us: 198.0,
                rps: 100.0
            }
        );
    }

    #[test]
    fn the_median_over_rounds_shrugs_off_one_noisy_round() {
        let round = |us, rps| Summary {
            count: 10,
            p50_us: us,
            p99_us: us * 2.0,
            rps,
        };
        let summary =
            Summary::median(&[round(50.0, 900.0), round(5000.0, 9.0), round(52.0, 880.0)]);
        assert_eq!(
            summary,
            Summary {
                count: 30,
                p50_us: 52.0,
                p99_us: 104.0,
                rps: 880.0
            }
        );
    }

    #[test]
    fn nothing_measured_is_not_taken_for_fast() {
        assert!(median(std::iter::empty()).is_nan());
    }
}
