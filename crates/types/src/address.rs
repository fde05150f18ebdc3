//! `host:port` as processes tell it to each other.

use std::{
    fmt,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    str::FromStr,
};

/// A host that others can dial, and a port: the authority of a URI without user information.
///
/// The host is an IPv4 address, an IPv6 address in brackets, or a DNS name. An IPv6 address without brackets is
/// refused: nobody can tell whether its last group is the port.
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

impl From<SocketAddr> for HostPort {
    fn from(address: SocketAddr) -> Self {
        Self { host: Host::Ip(address.ip()), port: address.port() }
    }
}

/// Why nobody can be told where a process listens.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AdvertiseError {
    /// What was given is none.
    #[error("advertise: {0}")]
    Address(AddressError),
    /// Nothing was given, and it listens everywhere.
    #[error("advertise: {listen} is every address of this machine; say under which one peers reach it")]
    Wildcard {
        /// Where it listens.
        listen: SocketAddr,
    },
}

/// Where others reach a process that listens on `bound`: what it was told to say, else the pod's address, else
/// where it listens.
pub fn advertised(
    advertise: Option<&str>,
    pod_ip: Option<IpAddr>,
    bound: SocketAddr,
) -> Result<HostPort, AdvertiseError> {
    match (advertise, pod_ip) {
        (Some(text), _) => text.parse().map_err(AdvertiseError::Address),
        (None, Some(ip)) => Ok(SocketAddr::new(ip, bound.port()).into()),
        (None, None) if bound.ip().is_unspecified() => Err(AdvertiseError::Wildcard { listen: bound }),
        (None, None) => Ok(bound.into()),
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
        Some(IpAddr::V6(_)) if bracketed.is_none() => {
            Err("an IPv6 address stands in brackets, [address]:port")
        }
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
    fn a_wildcard_is_not_advertised_and_a_pods_address_is() {
        let told = |advertise, pod_ip: Option<&str>, bound: &str| {
            let pod_ip = pod_ip.and_then(|ip| ip.parse().ok());
            let bound = bound.parse().unwrap_or_else(|_| SocketAddr::from(([0; 4], 0)));
            advertised(advertise, pod_ip, bound)
                .map(|told| told.to_string())
                .map_err(|error| error.to_string())
        };
        let is = |text: &str| Ok(text.to_owned());
        assert_eq!(told(None, None, "127.0.0.1:7"), is("127.0.0.1:7"));
        assert_eq!(told(None, None, "[::1]:7"), is("[::1]:7"));
        assert_eq!(told(None, Some("fd00::5"), "[::]:7"), is("[fd00::5]:7"));
        assert_eq!(told(None, Some("10.0.0.5"), "0.0.0.0:7"), is("10.0.0.5:7"));
        assert_eq!(told(Some("shard-0:9"), Some("10.0.0.5"), "0.0.0.0:7"), is("shard-0:9"));
        for wildcard in ["0.0.0.0:7", "[::]:7"] {
            let refused = told(None, None, wildcard);
            assert!(refused.as_ref().is_err_and(|error| error.contains(wildcard)), "{refused:?}");
        }
        let refused = told(Some("fd00::5:7"), None, "[::]:7");
        assert!(refused.as_ref().is_err_and(|error| error.contains("[address]:port")), "{refused:?}");
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
            // As `$(POD_IP):port` gives it in a pod with an IPv6 address.
            ("fd00::5:50052", "[address]:port"),
            ("::1:8080", "[address]:port"),
            (":::1", "[address]:port"),
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
