//! What was measured, as a person and as a program reads it.

use std::fmt;

use serde::Serialize;

use crate::args::{Op, Who};
use crate::process::kernel_says;
use crate::samples::Summary;

/// One row of one server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Row {
    pub(crate) who: Who,
    pub(crate) op: Op,
    pub(crate) concurrency: u16,
}

/// Every row that was measured.
#[derive(Debug)]
pub(crate) struct Figures(Vec<(Row, Summary)>);

impl Figures {
    pub(crate) fn new(rows: impl Iterator<Item = (Row, Summary)>) -> Self {
        Self(rows.collect())
    }

    fn get(&self, who: Who, op: Op, concurrency: u16) -> Option<&Summary> {
        let wanted = Row {
            who,
            op,
            concurrency,
        };
        self.0
            .iter()
            .find(|(row, _)| *row == wanted)
            .map(|(_, summary)| summary)
    }
}

/// Everything that a run found.
#[derive(Debug)]
pub(crate) struct Report {
    pub(crate) machine: String,
    /// What else kept the processors busy while nothing was measured: before and after, the larger.
    pub(crate) busy_percent: f64,
    pub(crate) figures: Figures,
    pub(crate) status_hung: Option<Summary>,
    pub(crate) start_ms: Option<f64>,
    pub(crate) memory_mb: Option<f64>,
}

/// Cores, processor and kernel.
pub(crate) fn machine() -> String {
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let model = kernel_says("/proc/cpuinfo", "model name")
        .and_then(|line| Some(line.split_once(':')?.1.trim().to_owned()))
        .unwrap_or_else(|| "unknown processor".to_owned());
    let kernel = kernel_says("/proc/sys/kernel/osrelease", "").unwrap_or_default();
    format!("{cores} x {model}, Linux {kernel}")
}

/// Above this the scheduler's decisions about others are measured rather than the servers.
const QUIET_PERCENT: f64 = 10.0;

/// A figure for programs.
#[derive(Debug, Serialize, PartialEq)]
struct Entry {
    name: String,
    value: f64,
    unit: &'static str,
}

impl Report {
    pub(crate) fn json(&self) -> String {
        // Numbers and names only: nothing in it can fail to be JSON.
        let mut text = serde_json::to_string_pretty(&self.entries()).unwrap_or_default();
        text.push('\n');
        text
    }

    fn entries(&self) -> Vec<Entry> {
        let mut entries = Vec::new();
        let mut add = |name: String, value: f64, unit| {
            entries.push(Entry {
                name,
                value: round(value),
                unit,
            })
        };
        for (row, summary) in &self.figures.0 {
            let row = format!("{}.{}.c{}", row.who.name(), row.op.name(), row.concurrency);
            add(format!("{row}.p50_us"), summary.p50_us, "us");
            add(format!("{row}.p99_us"), summary.p99_us, "us");
            add(format!("{row}.rps"), summary.rps, "1/s");
        }
        if let Some(hung) = &self.status_hung {
            add("hsmd.status_hung.c1.p99_us".to_owned(), hung.p99_us, "us");
        }
        if let Some(start) = self.start_ms {
            add("hsmd.start.c1.p50_ms".to_owned(), start, "ms");
        }
        if let Some(memory) = self.memory_mb {
            add("hsmd.rss.c16.mb".to_owned(), memory, "MB");
        }
        entries
    }

    /// The bar of the first release, each with what was measured.
    fn bar(&self) -> Vec<Bar> {
        let decrypt = |who, concurrency| self.figures.get(who, Op::Decrypt, concurrency);
        let mut bar = Vec::new();
        if let (Some(hsmd), Some(raw), Some(echo)) = (
            decrypt(Who::Hsmd, 1),
            decrypt(Who::Raw, 1),
            decrypt(Who::Echo, 1),
        ) {
            let limit = raw.p50_us + echo.p50_us + 40.0;
            bar.push(Bar::at_most(
                "Decrypt p50 at 1, raw + echo + 40",
                hsmd.p50_us,
                limit,
                "us",
            ));
        }
        if let (Some(hsmd), Some(peer)) = (decrypt(Who::Hsmd, 16), decrypt(Who::Peer, 16)) {
            bar.push(Bar::at_least(
                "Decrypt rate at 16, 1.3 x peer",
                hsmd.rps,
                1.3 * peer.rps,
                "1/s",
            ));
            bar.push(Bar::at_most(
                "Decrypt p99 at 16, 0.7 x peer",
                hsmd.p99_us,
                0.7 * peer.p99_us,
                "us",
            ));
        }
        if let Some(hung) = &self.status_hung {
            bar.push(Bar::at_most(
                "Status p99 while the module hangs",
                hung.p99_us,
                1000.0,
                "us",
            ));
        }
        if let Some(start) = self.start_ms {
            bar.push(Bar::at_most(
                "start of hsmd to its first answer",
                start,
                20.0,
                "ms",
            ));
        }
        if let Some(memory) = self.memory_mb {
            bar.push(Bar::at_most(
                "memory of hsmd under load, peak",
                memory,
                10.0,
                "MB",
            ));
        }
        bar
    }
}

/// A tenth is finer than any two runs agree.
fn round(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

struct Bar {
    what: &'static str,
    measured: f64,
    limit: f64,
    unit: &'static str,
    relation: &'static str,
    met: bool,
}

impl Bar {
    fn at_most(what: &'static str, measured: f64, limit: f64, unit: &'static str) -> Self {
        Self {
            what,
            measured,
            limit,
            unit,
            relation: "<=",
            met: measured <= limit,
        }
    }

    fn at_least(what: &'static str, measured: f64, limit: f64, unit: &'static str) -> Self {
        Self {
            what,
            measured,
            limit,
            unit,
            relation: ">=",
            met: measured >= limit,
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{}, {:.0} % busy with other work",
            self.machine, self.busy_percent
        )?;
        if self.busy_percent > QUIET_PERCENT {
            writeln!(
                f,
                "The machine was not quiet: repeat this before believing it."
            )?;
        }
        writeln!(f)?;
        write!(f, "{:<24}", "")?;
        for who in Who::ALL {
            write!(f, "{:>10}", who.name())?;
        }
        writeln!(f)?;
        for op in [Op::Decrypt, Op::Encrypt, Op::Status] {
            for concurrency in [1, 16] {
                type Stat = (&'static str, fn(&Summary) -> f64);
                let stats: [Stat; 3] = [
                    ("p50 us", |summary| summary.p50_us),
                    ("p99 us", |summary| summary.p99_us),
                    ("1/s", |summary| summary.rps),
                ];
                for (at, (stat, value)) in stats.into_iter().enumerate() {
                    let row = if at == 0 {
                        format!("{}, {concurrency} in flight", op.name())
                    } else {
                        String::new()
                    };
                    write!(f, "{row:<24}")?;
                    for who in Who::ALL {
                        match self.figures.get(who, op, concurrency) {
                            Some(summary) if stat == "1/s" => {
                                write!(f, "{:>10.0}", value(summary))?
                            }
                            Some(summary) => write!(f, "{:>10.1}", value(summary))?,
                            None => write!(f, "{:>10}", "-")?,
                        }
                    }
                    writeln!(f, "  {stat}")?;
                }
            }
        }
        writeln!(f)?;
        for Bar {
            what,
            measured,
            limit,
            unit,
            relation,
            met,
        } in self.bar()
        {
            let verdict = if met { "met" } else { "not met" };
            writeln!(
                f,
                "{what:<36}{measured:>10.1} {relation} {limit:>8.1} {unit:<4} {verdict}"
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let summary = |p50_us| Summary {
            count: 100,
            p50_us,
            p99_us: 2.0 * p50_us,
            rps: 1e6 / p50_us,
        };
        let row = |who, concurrency, p50| {
            (
                Row {
                    who,
                    op: Op::Decrypt,
                    concurrency,
                },
                summary(p50),
            )
        };
        Report {
            machine: "2 x a processor".to_owned(),
            busy_percent: 3.0,
            figures: Figures::new(
                [
                    row(Who::Raw, 1, 20.0),
                    row(Who::Echo, 1, 40.04),
                    row(Who::Hsmd, 1, 101.0),
                    row(Who::Hsmd, 16, 500.0),
                    row(Who::Peer, 16, 1000.0),
                ]
                .into_iter(),
            ),
            status_hung: Some(summary(90.0)),
            start_ms: Some(7.25),
            memory_mb: Some(10.5),
        }
    }

    #[test]
    fn figures_for_programs_are_named_who_op_concurrency_stat() {
        let entries = report().entries();
        let value = |name: &str| {
            entries
                .iter()
                .find(|entry| entry.name == name)
                .map(|entry| (entry.value, entry.unit))
        };
        assert_eq!(value("echo.decrypt.c1.p50_us"), Some((40.0, "us")));
        assert_eq!(value("peer.decrypt.c16.rps"), Some((1000.0, "1/s")));
        assert_eq!(value("hsmd.status_hung.c1.p99_us"), Some((180.0, "us")));
        assert_eq!(value("hsmd.start.c1.p50_ms"), Some((7.3, "ms")));
        assert_eq!(value("hsmd.rss.c16.mb"), Some((10.5, "MB")));
        assert_eq!(value("raw.status.c1.p50_us"), None);
    }

    #[test]
    fn the_bar_says_met_or_not_met_with_the_measured_value() {
        let text = report().to_string();
        let line = |start: &str| {
            text.lines()
                .find(|line| line.starts_with(start))
                .unwrap()
                .to_owned()
        };
        assert!(
            line("Decrypt p50 at 1").ends_with("101.0 <=    100.0 us   not met"),
            "{text}"
        );
        assert!(
            line("Decrypt rate at 16").ends_with("2000.0 >=   1300.0 1/s  met"),
            "{text}"
        );
        assert!(
            line("Decrypt p99 at 16").ends_with("1000.0 <=   1400.0 us   met"),
            "{text}"
        );
        assert!(
            line("memory of hsmd").ends_with("10.5 <=     10.0 MB   not met"),
            "{text}"
        );
    }

    #[test]
    fn a_machine_with_other_work_is_said_to_spoil_the_figures() {
        let quiet = report();
        assert!(!quiet.to_string().contains("not quiet"));
        let busy = Report {
            busy_percent: 60.0,
            ..quiet
        };
        assert!(
            busy.to_string()
                .contains("60 % busy with other work\nThe machine was not quiet")
        );
    }

    #[test]
    fn a_server_that_was_left_out_is_a_dash_and_sets_no_bar() {
        let text = Report {
            figures: Figures::new(std::iter::empty()),
            status_hung: None,
            ..report()
        }
        .to_string();
        assert!(
            text.contains(
                "decrypt, 1 in flight             -         -         -         -  p50 us"
            ),
            "{text}"
        );
        assert!(!text.contains("Decrypt p50 at 1"), "{text}");
    }
}
