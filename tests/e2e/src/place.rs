//! Where a node's daemon has its files on the workbench, and the configuration it is given.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::softhsm::{MODULE, SoftHsm, TOKEN};
use crate::workbench::Workbench;

/// A node: configuration, sockets and notes of one daemon.
#[derive(Debug, Clone)]
pub struct Place {
    /// What its daemon's log is called.
    pub(crate) name: String,
    folder: PathBuf,
    /// The configuration file.
    pub config: PathBuf,
    pub(crate) run: String,
    /// The KMS socket.
    pub socket: PathBuf,
    pub(crate) health: PathBuf,
}

/// A configuration file's content.
#[derive(Debug, Clone)]
pub struct Contents {
    /// The cluster's own name.
    pub cluster: String,
    /// Its former names.
    pub accept: Vec<String>,
    /// Label, epoch, state; in the file's order.
    pub keys: Vec<(&'static str, u32, &'static str)>,
}

impl Contents {
    /// One cluster, these keys.
    pub fn new(cluster: &str, keys: &[(&'static str, u32, &'static str)]) -> Self {
        Self {
            cluster: cluster.to_owned(),
            accept: Vec::new(),
            keys: keys.to_vec(),
        }
    }

    /// With a former name.
    pub fn accepting(mut self, name: &str) -> Self {
        self.accept.push(name.to_owned());
        self
    }
}

impl Place {
    /// The workbench's only node.
    pub fn only(bench: &Workbench) -> Self {
        Self::at(bench, "hsmd", "", "run")
    }

    /// One of several nodes.
    pub fn named(bench: &Workbench, name: &str) -> Self {
        Self::at(
            bench,
            &format!("hsmd-{name}"),
            &format!("{name}-"),
            &format!("run-{name}"),
        )
    }

    fn at(bench: &Workbench, name: &str, prefix: &str, run: &str) -> Self {
        let folder = bench.path().to_owned();
        Self {
            name: name.to_owned(),
            config: folder.join(format!("{prefix}hsmd.yaml")),
            health: folder.join(format!("{prefix}health.sock")),
            socket: folder.join(run).join("kms.sock"),
            run: run.to_owned(),
            folder,
        }
    }

    /// Writes the configuration as Talos or a careful editor does: whole, in the old one's place.
    /// The tokens are listed in this order, each under its own name.
    pub fn configure(
        &self,
        bench: &Workbench,
        tokens: &[&SoftHsm],
        contents: &Contents,
    ) -> Result<()> {
        let new = format!("{}-new.yaml", self.name);
        let new = bench.write(&new, &self.text(tokens, contents), 0)?;
        fs::rename(new, &self.config).context("cannot put the configuration in its place")
    }

    /// Takes the configuration away.
    pub fn lose_configuration(&self) -> Result<()> {
        fs::remove_file(&self.config).context("cannot remove the configuration")
    }

    fn text(&self, tokens: &[&SoftHsm], contents: &Contents) -> String {
        let mut text = format!(
            "cluster: {}\naccept_clusters: [{}]\ntokens:\n",
            contents.cluster,
            contents.accept.join(", ")
        );
        for token in tokens {
            text += &format!(
                "  - name: {name}
    uri: pkcs11:token={TOKEN}
    module: {MODULE}
    pin: {{file: {pin}}}
    host:
      env: {{SOFTHSM2_CONF: {conf}}}
      read_only: [{conf}]
      read_write: [{folder}]
",
                name = token.name(),
                pin = token.pin_file.display(),
                conf = token.conf.display(),
                folder = token.folder().display(),
            );
        }
        text += &format!(
            "kms:
  listen:
    - {{path: {socket}, mode: \"0600\", owner: \"65534:65534\"}}
  keys:
",
            socket = self.socket.display()
        );
        for (label, epoch, state) in &contents.keys {
            text += &format!(
                "    - uri: pkcs11:token={TOKEN};object={label};type=secret-key
      epoch: {epoch}
      state: {state}
      backup: acknowledged
"
            );
        }
        text += &format!(
            "state_dirs: [{}]\n",
            self.folder.join(format!("state-{}", self.name)).display()
        );
        text
    }
}
