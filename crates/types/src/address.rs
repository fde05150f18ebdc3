//! `host:port` as processes tell it to each other.

use std::{
    fmt,
    net::{IpAddr, Ipv6Addr},
    str::FromStr,
};

/// A host that others can dial, and a port: the authority of a URI without user information.
///
/// The host is an IPv4 address, an IPv6 address in brackets, or a DNS name. An IPv6 address without brackets is
/// read as `address:port` (its last group is the port), because that is what `$(POD_IP):port` gives in a pod;
/// it is printed with brackets.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct HostPort {
    host: Host,
    port: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Host {
    Ip(IpAddr),
    Name(String),
}

/// A text that is no [`HostPort`]. The text itself is quoted, so that it cannot forge a log line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not host:port: {problem}")]
pub struct AddressError {
    /// What was given.
    pub text: String,
    /// What is wrong with it.
    pub problem: &'static str,
}

/// Longest DNS name and label in bytes (RFC 1035).
const MAX_NAME: usize = 253;
const MAX_LABEL: usize = 63;

impl HostPort {
    /// The host's address if it is one and not a name.
    pub fn ip(&self) -> Option<IpAddr> {
        match self.host {
            Host::Ip(ip) => Some(ip),
            Host::Name(_) => None,
        }
    }

    /// The port; never 0.
    pub fn port(&self) -> u16 {
        self.port
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            Host::Ip(IpAddr::V6(ip)) => write!(f, "[{ip}]:{}", self.port),
            Host::Ip(ip) => write!(f, "{ip}:{}", self.port),
            Host::Name(name) => write!(f, "{name}:{}", self.port),
        }
    }
}

impl FromStr for HostPort {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let refused = |problem| AddressError { text: text.to_owned(), problem };
        let (host, port) = text.rsplit_once(':').ok_or_else(|| refused("the port is missing"))?;
        if port.is_empty() || !port.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(refused("the port is no number"));
        }
        let port = match port.parse::<u16>() {
            Ok(0) | Err(_) => return Err(refused("the port must be in 1..=65535")),
            Ok(port) => port,
        };
        Ok(Self { host: host_of(host).map_err(refused)?, port })
    }
}

fn host_of(text: &str) -> Result<Host, &'static str> {
    let bracketed = text.strip_prefix('[').and_then(|text| text.strip_suffix(']'));
    let ip = match bracketed {
        Some(inside) => {
            Some(IpAddr::V6(inside.parse::<Ipv6Addr>().map_err(|_| "no IPv6 address is in the brackets")?))
        }
        None => text.parse().ok(),
    };
    match ip {
        Some(ip) if ip.is_unspecified() => Err("nobody can dial every address"),
        Some(ip) => Ok(Host::Ip(ip)),
        None if text.is_empty() => Err("the host is missing"),
        None if is_name(text) => Ok(Host::Name(text.to_owned())),
        None => Err("the host is neither an address nor a DNS name"),
    }
}

/// As clusters have them: underscores are no host names by the letter, and in use.
fn is_name(text: &str) -> bool {
    let is_label = |label: &str| {
        (1..=MAX_LABEL).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    let name = text.strip_suffix('.').unwrap_or(text);
    // A dotted number that is no IPv4 address would be asked of DNS in vain.
    let numeric = name.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
    name.len() <= MAX_NAME && !numeric && name.split('.').all(is_label)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_of_every_kind_come_back_as_they_are_dialled() {
        for (text, dialled) in [
            ("127.0.0.1:7", "127.0.0.1:7"),
            ("[::1]:50052", "[::1]:50052"),
            ("[FD00:0::5]:1", "[fd00::5]:1"),
            // As `$(POD_IP):port` gives it.
            ("fd00::5:50052", "[fd00::5]:50052"),
            ("::1:8080", "[::1]:8080"),
            ("worker-0.decode.ns.svc:65535", "worker-0.decode.ns.svc:65535"),
            ("shard_1:1", "shard_1:1"),
            ("cluster.local.:1", "cluster.local.:1"),
        ] {
            assert_eq!(text.parse::<HostPort>().map(|parsed| parsed.to_string()), Ok(dialled.to_owned()));
        }
        assert_eq!("[::1]:7".parse::<HostPort>().map(|parsed| parsed.ip()), Ok("::1".parse().ok()));
        assert_eq!("a:7".parse::<HostPort>().map(|parsed| parsed.ip()), Ok(None));
    }

    #[test]
    fn what_nobody_can_dial_is_refused_and_named() {
        let long = format!("{}:1", "a".repeat(64));
        for (text, problem) in [
            ("", "port is missing"),
            ("worker-0", "port is missing"),
            ("worker-0:", "no number"),
            ("worker-0:http", "no number"),
            ("worker-0:+1", "no number"),
            ("worker-0:0", "1..=65535"),
            ("worker-0:65536", "1..=65535"),
            (":1", "host is missing"),
            ("0.0.0.0:1", "every address"),
            ("[::]:1", "every address"),
            (":::1", "every address"),
            ("[::1:1", "neither"),
            ("[worker]:1", "brackets"),
            ("[127.0.0.1]:1", "brackets"),
            ("http://worker:1", "neither"),
            ("user@worker:1", "neither"),
            ("worker:1/path:2", "neither"),
            ("a b:1", "neither"),
            ("a\nb:1", "neither"),
            ("-a:1", "neither"),
            ("a..b:1", "neither"),
            ("300.0.0.1:1", "neither"),
            ("fe80::1%eth0:1", "neither"),
            (long.as_str(), "neither"),
        ] {
            let error = text.parse::<HostPort>().expect_err(text).to_string();
            assert!(error.contains(problem) && error.starts_with(&format!("{text:?}")), "{text:?}: {error}");
            assert!(!error.contains('\n'), "{error:?}");
        }
    }
}
