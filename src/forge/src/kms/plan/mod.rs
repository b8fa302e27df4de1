//! `hsmctl kms plan OLD NEW`: may a daemon that runs OLD take NEW, and what does that mean for a fleet?
//!
//! The rules are the daemon's own ([`hsm_config::plan`]). Everything is known from the two files: no
//! token and no daemon is asked, so it can run where the files are made.

mod changes;
mod fleet;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

use hsm_config::plan::{self, Illegal};
use hsm_config::{Config, Errors};
use serde_json::json;

use crate::outcome::{self, Failure, Format, Outcome};
use crate::text::paragraph;
use changes::{Changes, KeyChange, Standing};
use fleet::{Foretold, Guidance, Pace};

pub(crate) const EXAMPLES: &str = "\
Examples:
  hsmctl kms plan running.yaml next.yaml
  hsmctl kms plan --pick-up 10 running.yaml next.yaml    nodes take up to ten minutes
  hsmctl kms plan -o json running.yaml next.yaml | jq .legal

Exit status: 0 the step is legal (or changes nothing), 1 it is refused or a file is wrong,
2 a wrong command line. A daemon refuses the same steps by itself.";

#[derive(clap::Args)]
pub(crate) struct Args {
    /// The configuration that the nodes run
    old: PathBuf,
    /// The one they are to run
    new: PathBuf,
    /// N of the waiting rule: minutes until the last node reports the new key_id
    ///
    /// kube-apiserver asks the daemon once a minute, and the daemon takes a new file within seconds.
    #[arg(long, value_name = "MINUTES", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=10_080))]
    pick_up: u32,
    /// M of the waiting rule: minutes to be safe, at least 5
    #[arg(long, value_name = "MINUTES", default_value_t = 5, value_parser = clap::value_parser!(u32).range(5..=10_080))]
    margin: u32,
    /// Form of the answer
    #[arg(short, long, value_name = "FORM", default_value = "text")]
    output: Format,
}

pub(crate) fn run(args: &Args) -> Result<Outcome, Failure> {
    let (old, new) = load(&args.old, &args.new)?;
    let pace = Pace {
        pick_up: args.pick_up,
        margin: args.margin,
    };
    let plan = Plan::of(&old, &new, pace);
    let out = match args.output {
        Format::Text => plan.text(&args.old, &args.new),
        Format::Json => outcome::json(&plan.json()),
    };
    Ok(match plan.verdict {
        Ok(_) => Outcome::done(out),
        Err((illegal, _)) => Outcome::refused(out, Failure::of(&illegal, Some(&illegal.hint()))),
    })
}

/// Both files' mistakes at once.
fn load(old: &Path, new: &Path) -> Result<(Config, Config), Failure> {
    match (hsm_config::load(old), hsm_config::load(new)) {
        (Ok(old), Ok(new)) => Ok((old, new)),
        (old, new) => {
            let reports = [old.err(), new.err()];
            let reports: Vec<String> = reports.iter().flatten().map(Errors::report).collect();
            Err(Failure::reported(&reports))
        }
    }
}

/// Seen of 1.34 and 1.37: the watch cache lists all Secrets at once.
const UNREADABLE: &str = "One Secret that does not open fails every list of Secrets, and a kube-apiserver that is started then stays unready: [-]informer-sync failed.";

struct Plan {
    changes: Changes,
    /// What to do, or why not and what would come of it.
    verdict: Result<Guidance, (Illegal, Vec<Foretold>)>,
}

impl Plan {
    fn of(old: &Config, new: &Config, pace: Pace) -> Self {
        let changes = Changes::between(old, new);
        let verdict = match plan::check(old, new) {
            Ok(()) => Ok(fleet::guide(old, new, &changes, pace)),
            Err(illegal) => {
                let foretold = fleet::foretell(old, new, &changes, &illegal);
                Err((illegal, foretold))
            }
        };
        Self { changes, verdict }
    }

    fn text(&self, old: &Path, new: &Path) -> String {
        let (old, new) = (old.display(), new.display());
        if self.changes.is_empty() {
            return format!("unchanged: {old} and {new} say the same\n");
        }
        let mut out = format!("{old} -> {new}\n");
        section(&mut out, "keys", self.changes.keys.iter().map(key));
        for (title, changes) in [
            ("cluster", &self.changes.clusters),
            ("tokens", &self.changes.tokens),
        ] {
            let lines = changes
                .iter()
                .map(|change| paragraph("  ", &format!("{} {}", change.name, change.words)));
            section(&mut out, title, lines);
        }
        let also = self.changes.also.join(", ");
        section(
            &mut out,
            "also changed",
            (!also.is_empty()).then(|| format!("  {also}\n")),
        );
        let (title, foretold) = match &self.verdict {
            Ok(guidance) => {
                let steps = guidance.steps.iter().zip(1..);
                let lines = steps.map(|(step, number)| paragraph(&format!("  {number}. "), step));
                section(&mut out, "for the fleet", lines);
                ("what would go wrong otherwise", &guidance.foretold)
            }
            Err((_, foretold)) => ("what would come of it", foretold),
        };
        section(&mut out, title, foretold.iter().map(foretold_text));
        if !foretold.is_empty() {
            out += &paragraph("  ", UNREADABLE);
        }
        if self.verdict.is_ok() {
            out += &format!("\nlegal: a daemon that runs {old} takes {new}\n");
        }
        out
    }

    fn json(&self) -> serde_json::Value {
        let (guidance, refusal, foretold) = match &self.verdict {
            Ok(guidance) => (Some(guidance), None, &guidance.foretold),
            Err((illegal, foretold)) => {
                let refusal = json!({ "reason": illegal.to_string(), "hint": illegal.hint() });
                (None, Some(refusal), foretold)
            }
        };
        json!({
            "legal": refusal.is_none(),
            "refusal": refusal,
            "unchanged": self.changes.is_empty(),
            "keys": self.changes.keys,
            "clusters": self.changes.clusters,
            "tokens": self.changes.tokens,
            "also": self.changes.also,
            "key_id_changes": self.changes.key_id_changes,
            "steps": guidance.map(|guidance| &guidance.steps),
            "wait_minutes": guidance.and_then(|guidance| guidance.wait_minutes),
            "foretold": foretold,
        })
    }
}

fn section(out: &mut String, title: &str, lines: impl IntoIterator<Item = String>) {
    let mut lines = lines.into_iter().peekable();
    if lines.peek().is_some() {
        *out += &format!("\n{title}\n");
        out.extend(lines);
    }
}

fn key(key: &KeyChange) -> String {
    let standing = |standing: Option<Standing>| {
        standing.map(|Standing { state, epoch, .. }| format!("{} (epoch {epoch})", state.name()))
    };
    let what = match (standing(key.before), standing(key.after)) {
        (Some(before), Some(after)) if before == after => before,
        (Some(before), Some(after)) => format!("{before} -> {after}"),
        (Some(before), None) => format!("{before} -> not listed"),
        (None, Some(after)) => format!("not listed -> {after}"),
        (None, None) => String::new(),
    };
    format!(
        "  {}\n{}",
        key.uri,
        paragraph("    ", &format!("{what}: {}", key.words))
    )
}

/// The messages are not broken into lines: they are to be searched for.
fn foretold_text(foretold: &Foretold) -> String {
    let Foretold {
        when,
        code,
        message,
        kube_apiserver,
    } = foretold;
    paragraph("  ", &format!("If {when},"))
        + &format!("    hsmd answers Decrypt with {code}:\n      {message}\n")
        + &format!("    kube-apiserver answers and logs:\n      {kube_apiserver}\n")
}
