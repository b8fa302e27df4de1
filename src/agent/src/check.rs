//! `hsmd check FILE`: looks at a configuration without starting anything.

use std::path::Path;

use hsm_config::{Config, load};

/// What to print on stdout and stderr, and the exit code.
pub(crate) fn command(path: &Path) -> (String, String, u8) {
    match load(path) {
        Ok(config) => (summary(&config, path), String::new(), 0),
        Err(errors) => (String::new(), errors.report(), 1),
    }
}

fn summary(config: &Config, path: &Path) -> String {
    let mut out = format!(
        "{}: ok: cluster `{}`\n",
        path.display(),
        config.clusters.own
    );
    for token in &config.tokens {
        out += &format!(
            "  token {}: {} by {}\n",
            token.name,
            token.uri,
            token.module.display()
        );
    }
    for key in &config.kms.keys {
        out += &format!(
            "  key {}: {}, epoch {}\n",
            key.uri,
            key.state.name(),
            key.epoch
        );
    }
    out
}
