//! Kubernetes quantities as exact numbers: `1.5Gi`, `512Mi`, `250m`, `1e3`.
//!
//! Integers all the way: a quantity is rounded up to the unit asked for, as Kubernetes does, and one that does not
//! fit 64 bits is refused.

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

/// Why a quantity is none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QuantityError {
    quantity: String,
    fault: &'static str,
}

impl std::fmt::Display for QuantityError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "quantity {:?}: {}", self.quantity, self.fault)
    }
}

impl std::error::Error for QuantityError {}

/// The quantity in whole units (bytes), rounded up.
pub fn units(quantity: &Quantity) -> Result<u64, QuantityError> {
    scaled(&quantity.0, 0).map_err(|fault| QuantityError { quantity: quantity.0.clone(), fault })
}

/// The quantity in thousandths (of a CPU), rounded up.
pub fn thousandths(quantity: &Quantity) -> Result<u64, QuantityError> {
    scaled(&quantity.0, 3).map_err(|fault| QuantityError { quantity: quantity.0.clone(), fault })
}

/// `text × 10^decimals`, rounded up.
fn scaled(text: &str, decimals: i32) -> Result<u64, &'static str> {
    const TOO_LARGE: &str = "does not fit 64 bits";
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') {
        return Err("no number (512Mi, 1.5Gi, 250m)");
    }
    let (factor, power): (u128, i32) = match suffix {
        "" => (1, 0),
        "n" => (1, -9),
        "u" => (1, -6),
        "m" => (1, -3),
        "k" => (1, 3),
        "M" => (1, 6),
        "G" => (1, 9),
        "T" => (1, 12),
        "P" => (1, 15),
        "E" => (1, 18),
        "Ki" => (1 << 10, 0),
        "Mi" => (1 << 20, 0),
        "Gi" => (1 << 30, 0),
        "Ti" => (1 << 40, 0),
        "Pi" => (1 << 50, 0),
        "Ei" => (1 << 60, 0),
        _ => {
            let exponent = suffix.strip_prefix(['e', 'E']).and_then(|digits| digits.parse::<i8>().ok());
            (1, exponent.ok_or("unknown unit (Ki, Mi, Gi, Ti, k, M, G, T, m)")?.into())
        }
    };
    let digits = format!("{whole}{fraction}");
    let digits = digits.trim_start_matches('0');
    let mantissa: u128 = if digits.is_empty() { 0 } else { digits.parse().map_err(|_| TOO_LARGE)? };
    let power = power + decimals - i32::try_from(fraction.len()).map_err(|_| TOO_LARGE)?;
    let scaled = mantissa.checked_mul(factor).ok_or(TOO_LARGE)?;
    let scaled = match 10_u128.checked_pow(power.unsigned_abs()) {
        Some(ten) if power >= 0 => scaled.checked_mul(ten).ok_or(TOO_LARGE)?,
        Some(ten) => scaled.div_ceil(ten),
        None if power < 0 || scaled == 0 => u128::from(scaled != 0),
        None => return Err(TOO_LARGE),
    };
    u64::try_from(scaled).map_err(|_| TOO_LARGE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_kubernetes_reads_them() {
        for (text, bytes) in [
            ("0", 0),
            ("512Mi", 512 << 20),
            ("1.5Gi", 3 << 29),
            (".5Ki", 512),
            ("1e3", 1000),
            ("2E0", 2),
            ("100m", 1),
            ("1001m", 2),
            ("3k", 3000),
            ("0.0000000000000000000000000000000000000000001", 1),
            ("15Ei", 15 << 60),
        ] {
            assert_eq!(units(&Quantity(text.into())), Ok(bytes), "{text}");
        }
        assert_eq!(thousandths(&Quantity("250m".into())), Ok(250));
        assert_eq!(thousandths(&Quantity("1.5".into())), Ok(1500));
        assert_eq!(thousandths(&Quantity("100u".into())), Ok(1));
    }

    #[test]
    fn refuses_what_is_none() {
        for text in [
            "",
            "-1",
            "Gi",
            "1.2.3",
            "1Gb",
            "1 Gi",
            "1e99",
            "16Ei",
            "99999999999999999999999999999999999999999",
        ] {
            let error = units(&Quantity(text.into())).expect_err(text);
            assert!(error.to_string().starts_with(&format!("quantity {text:?}: ")), "{error}");
        }
    }
}
