//! A port of a Service or pod on loopback, by `kubectl port-forward`.

use std::{
    io::{BufRead, BufReader, Read},
    process::{Child, Stdio},
    sync::mpsc,
    thread,
};

use crate::{kubectl::Kubectl, wait::LIMIT};

/// A forwarded port; ends with this value.
#[derive(Debug)]
pub struct PortForward {
    child: Child,
    address: String,
}

impl PortForward {
    /// Forwards a free port to `what` (`service/NAME`, `pod/NAME`) and waits until it is open.
    #[track_caller]
    pub fn open(kubectl: &Kubectl, what: &str, port: u16) -> Self {
        let mut command = kubectl.command();
        command.args(["port-forward", what, &format!(":{port}"), "--address=127.0.0.1"]);
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let mut child = child.expect("kubectl starts");
        let (stdout, stderr) = (child.stdout.take().expect("piped"), child.stderr.take().expect("piped"));
        let (sender, receiver) = mpsc::channel();
        // Reads on to the end, or the pipe would fill; a receiver that has gone is no loss.
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                let address = forwarded(&line).map(str::to_owned);
                address.and_then(|address| sender.send(address).ok());
            }
        });
        let errors = thread::spawn(move || {
            let mut text = String::new();
            let _ = BufReader::new(stderr).read_to_string(&mut text);
            text
        });
        match receiver.recv_timeout(LIMIT) {
            Ok(address) => Self { child, address },
            Err(_) => {
                // It may have ended already.
                let _ = child.kill();
                let _ = child.wait();
                panic!("no port-forward to {what} {port}: {}", errors.join().unwrap_or_default());
            }
        }
    }

    /// `127.0.0.1:PORT`
    pub fn address(&self) -> &str {
        &self.address
    }
}

impl Drop for PortForward {
    fn drop(&mut self) {
        // It ends by itself when its pod goes.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The address in `Forwarding from 127.0.0.1:40123 -> 8000`.
fn forwarded(line: &str) -> Option<&str> {
    let (address, _) = line.strip_prefix("Forwarding from ")?.split_once(" -> ")?;
    address.starts_with("127.0.0.1:").then_some(address)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_kubectl_prints() {
        assert_eq!(forwarded("Forwarding from 127.0.0.1:40123 -> 8000"), Some("127.0.0.1:40123"));
        assert_eq!(forwarded("Forwarding from [::1]:40123 -> 8000"), None);
        assert_eq!(forwarded("Handling connection for 40123"), None);
    }
}
