//! May this configuration follow that one? Pure; no clock, no file, no token.
//!
//! An active key is named to the API server by its `key_id`, a hash of fingerprint, epoch and
//! cluster, and every node has to be able to open what any other node seals. Between two
//! configurations that follow each other legally, therefore:
//!
//! 1. **A key_id never comes back.** When key or epoch of the active rule change, the new epoch is
//!    higher than any that an active or retired rule had. (Within one file, retired epochs are below
//!    the active one and pending ones above; [`super::parse`] sees to that.)
//! 2. **An epoch belongs to one key.** None of the running configuration's epochs is given to another.
//! 3. **What sealed still opens, knowingly.** The active key stays listed, as active or retired. A
//!    pending key has sealed nothing and cannot retire.
//! 4. **No node seals what another cannot open.** A key becomes active only if the running
//!    configuration already lists it, so that every node that has it can open.
//! 5. **A cluster keeps its name or remembers it.** A former name goes into `accept_clusters`.
//! 6. **No node seals under a name that another refuses.** A new name has been in `accept_clusters`
//!    before it becomes the cluster's, as a new key has been pending before it is active.
//!
//! The first configuration has none before it and may activate at once. A key is known by its URI,
//! attribute by attribute: under another URI it is another key here, whatever the token says.

use thiserror::Error;

use crate::{ClusterNames, Config, KeyRule, KeyState};

/// Why a configuration must not follow the running one.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Illegal {
    /// An epoch changes its key.
    #[error("epoch {epoch} belongs to {old} and cannot be given to {new}")]
    EpochReused {
        /// The epoch.
        epoch: u64,
        /// Whose it is.
        old: String,
        /// Who is to have it.
        new: String,
    },
    /// An epoch falls.
    #[error("{key} has epoch {old} and cannot go back to {new}")]
    EpochLowered {
        /// The key.
        key: String,
        /// Running.
        old: u64,
        /// Wanted.
        new: u64,
    },
    /// A key that sealed is no longer listed.
    #[error("{key} is active and cannot be removed")]
    ActiveRemoved {
        /// The key.
        key: String,
    },
    /// A key that sealed is declared new.
    #[error("{key} is active and cannot become pending")]
    ActiveToPending {
        /// The key.
        key: String,
    },
    /// A key that never sealed is declared old.
    #[error("{key} is pending and cannot be retired: it never sealed anything")]
    PendingToRetired {
        /// The key.
        key: String,
    },
    /// A key seals before the other nodes know it.
    #[error("{key} cannot be activated at once: the running configuration does not list it")]
    NotAnnounced {
        /// The key.
        key: String,
    },
    /// A former key comes back under an epoch that was used.
    #[error("{key} is retired and can return only under an epoch above {highest}, not {epoch}")]
    NotRaised {
        /// The key.
        key: String,
        /// Wanted.
        epoch: u64,
        /// The highest one in use.
        highest: u64,
    },
    /// The active key takes an epoch that others passed.
    #[error("{key} cannot be active under epoch {epoch}: epoch {highest} was active already")]
    EpochPassed {
        /// The key.
        key: String,
        /// Wanted.
        epoch: u64,
        /// The highest one that was active.
        highest: u64,
    },
    /// The new name is sealed under before the other nodes accept it.
    #[error(
        "the cluster cannot become `{new}` at once: the running configuration does not accept that name"
    )]
    ClusterNotAnnounced {
        /// Wanted.
        new: String,
    },
    /// The old name is forgotten.
    #[error("the cluster is `{old}` and cannot become `{new}` while `{old}` is not accepted")]
    ClusterForgotten {
        /// Running.
        old: String,
        /// Wanted.
        new: String,
    },
}

impl Illegal {
    /// What to do instead.
    pub fn hint(&self) -> String {
        match self {
            Self::EpochReused { .. } => {
                "give the new key an epoch above every other; if it is the same key under another URI, keep the URI as it was".to_owned()
            }
            Self::EpochLowered { old, .. } => format!("keep epoch {old}, or raise it"),
            Self::ActiveRemoved { .. } => {
                "activate another key first and keep this one as `retired` until all Secrets are rewritten".to_owned()
            }
            Self::ActiveToPending { .. } => {
                "make it `retired`: it goes on opening what it sealed".to_owned()
            }
            Self::PendingToRetired { .. } => {
                "remove it, or keep it `pending` until it is activated".to_owned()
            }
            Self::NotAnnounced { .. } => {
                "add it as `pending` on every node first, then activate it".to_owned()
            }
            Self::NotRaised { highest, .. } => format!("give it epoch {}", highest.saturating_add(1)),
            Self::EpochPassed { highest, .. } => {
                format!("give it epoch {} or above", highest.saturating_add(1))
            }
            Self::ClusterNotAnnounced { new } => {
                format!("add `{new}` to accept_clusters on every node first, then rename the cluster")
            }
            Self::ClusterForgotten { old, .. } => {
                format!("add `{old}` to accept_clusters: its Secrets still have to open")
            }
        }
    }
}

/// `Ok` if a daemon that runs `old` may go on with `new`; else the first reason against it.
pub fn check(old: &Config, new: &Config) -> Result<(), Illegal> {
    check_clusters(&old.clusters, &new.clusters)?;
    check_keys(&old.kms.keys, &new.kms.keys)
}

fn check_clusters(old: &ClusterNames, new: &ClusterNames) -> Result<(), Illegal> {
    if old.own == new.own {
        return Ok(());
    }
    if !new.accepted.contains(&old.own) {
        return Err(Illegal::ClusterForgotten {
            old: old.own.clone(),
            new: new.own.clone(),
        });
    }
    if !old.accepted.contains(&new.own) {
        return Err(Illegal::ClusterNotAnnounced {
            new: new.own.clone(),
        });
    }
    Ok(())
}

fn check_keys(old: &[KeyRule], new: &[KeyRule]) -> Result<(), Illegal> {
    for rule in old {
        let key = || rule.uri.to_string();
        if let Some(other) = new
            .iter()
            .find(|other| other.epoch == rule.epoch && other.uri != rule.uri)
        {
            return Err(Illegal::EpochReused {
                epoch: rule.epoch,
                old: key(),
                new: other.uri.to_string(),
            });
        }
        let after = new.iter().find(|after| after.uri == rule.uri);
        match after.map(|after| after.state) {
            None if rule.state == KeyState::Active => {
                return Err(Illegal::ActiveRemoved { key: key() });
            }
            Some(KeyState::Pending) if rule.state == KeyState::Active => {
                return Err(Illegal::ActiveToPending { key: key() });
            }
            Some(KeyState::Retired) if rule.state == KeyState::Pending => {
                return Err(Illegal::PendingToRetired { key: key() });
            }
            _ => {}
        }
        let Some(after) = after else { continue };
        if after.epoch < rule.epoch {
            return Err(Illegal::EpochLowered {
                key: key(),
                old: rule.epoch,
                new: after.epoch,
            });
        }
        let returns = rule.state == KeyState::Retired && after.state != KeyState::Retired;
        let others = old.iter().chain(new).filter(|other| other.uri != rule.uri);
        let highest = others
            .map(|other| other.epoch)
            .max()
            .unwrap_or(0)
            .max(rule.epoch);
        if returns && after.epoch <= highest {
            return Err(Illegal::NotRaised {
                key: key(),
                epoch: after.epoch,
                highest,
            });
        }
    }
    let Some(active) = new.iter().find(|rule| rule.state == KeyState::Active) else {
        return Ok(());
    };
    let Some(before) = old.iter().find(|rule| rule.uri == active.uri) else {
        return Err(Illegal::NotAnnounced {
            key: active.uri.to_string(),
        });
    };
    let unchanged = before.state == KeyState::Active && before.epoch == active.epoch;
    let passed = old
        .iter()
        .filter(|rule| rule.state != KeyState::Pending)
        .map(|rule| rule.epoch)
        .max();
    match passed {
        Some(highest) if !unchanged && active.epoch <= highest => Err(Illegal::EpochPassed {
            key: active.uri.to_string(),
            epoch: active.epoch,
            highest,
        }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
