//! `strftime_now` for templates that write today's date.
//!
//! The clock is UTC: the router's own time zone must not change a prompt. English names, as in
//! Python's default locale. A directive outside the list is refused by name.

use std::{
    fmt::Write,
    time::{SystemTime, UNIX_EPOCH},
};

use minijinja::{Error, ErrorKind};

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const WEEKDAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
const SECONDS_PER_DAY: u64 = 86_400;

/// A moment after 1970, taken apart.
struct Civil {
    year: u64,
    /// 0 to 11.
    month: usize,
    /// 1 to 31.
    day: u64,
    /// 1 to 366.
    day_of_year: u64,
    /// 0 is Sunday.
    weekday: usize,
    hour: u64,
    minute: u64,
    second: u64,
}

impl Civil {
    fn new(now: SystemTime) -> Self {
        let seconds = now.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let days = seconds / SECONDS_PER_DAY;
        let of_day = seconds % SECONDS_PER_DAY;
        let mut civil = Self {
            year: 1970,
            month: 0,
            day: 0,
            day_of_year: 0,
            // 1 January 1970 was a Thursday.
            weekday: ((days + 4) % 7) as usize,
            hour: of_day / 3600,
            minute: of_day / 60 % 60,
            second: of_day % 60,
        };
        // Whole cycles of 400 years first, so that the loop is bounded by 400 steps.
        civil.year += days / DAYS_PER_CYCLE * 400;
        let mut left = days % DAYS_PER_CYCLE;
        while left >= days_of_year(civil.year) {
            left -= days_of_year(civil.year);
            civil.year += 1;
        }
        civil.day_of_year = left + 1;
        while left >= days_of_month(civil.year, civil.month) {
            left -= days_of_month(civil.year, civil.month);
            civil.month += 1;
        }
        civil.day = left + 1;
        civil
    }
}

/// Days of 400 Gregorian years, wherever they begin.
const DAYS_PER_CYCLE: u64 = 146_097;

fn is_leap(year: u64) -> bool {
    year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
}

fn days_of_year(year: u64) -> u64 {
    365 + u64::from(is_leap(year))
}

fn days_of_month(year: u64, month: usize) -> u64 {
    match month {
        1 => 28 + u64::from(is_leap(year)),
        3 | 5 | 8 | 10 => 30,
        _ => 31,
    }
}

/// Formats a moment; `-` after the percent sign drops the leading zero.
pub(super) fn format(now: SystemTime, format: &str) -> Result<String, Error> {
    let civil = Civil::new(now);
    let mut out = String::new();
    let mut rest = format.chars();
    while let Some(character) = rest.next() {
        if character != '%' {
            out.push(character);
            continue;
        }
        let mut directive = rest.next();
        let padded = directive != Some('-');
        if !padded {
            directive = rest.next();
        }
        write_directive(&mut out, &civil, directive, padded)?;
    }
    Ok(out)
}

fn write_directive(
    out: &mut String,
    civil: &Civil,
    directive: Option<char>,
    padded: bool,
) -> Result<(), Error> {
    let twelve = (civil.hour + 11) % 12 + 1;
    let (number, width) = match directive {
        Some('d') => (civil.day, 2),
        Some('m') => (civil.month as u64 + 1, 2),
        Some('Y') => (civil.year, 4),
        Some('y') => (civil.year % 100, 2),
        Some('H') => (civil.hour, 2),
        Some('I') => (twelve, 2),
        Some('M') => (civil.minute, 2),
        Some('S') => (civil.second, 2),
        Some('j') => (civil.day_of_year, 3),
        Some(name @ ('B' | 'b' | 'A' | 'a' | 'p' | '%' | 'F' | 'T')) if padded => {
            write_name(out, civil, name);
            return Ok(());
        }
        other => {
            let directive: String = other.into_iter().collect();
            let dash = if padded { "" } else { "-" };
            return Err(Error::new(
                ErrorKind::InvalidOperation,
                format!("strftime_now: %{dash}{directive} is not supported"),
            ));
        }
    };
    let width = if padded { width } else { 0 };
    // Writing to a String cannot fail.
    let _ = write!(out, "{number:0width$}");
    Ok(())
}

fn write_name(out: &mut String, civil: &Civil, name: char) {
    let month = MONTHS[civil.month];
    let weekday = WEEKDAYS[civil.weekday];
    let Civil { year, day, hour, minute, second, .. } = *civil;
    match name {
        'B' => out.push_str(month),
        'b' => out.push_str(&month[..3]),
        'A' => out.push_str(weekday),
        'a' => out.push_str(&weekday[..3]),
        'p' => out.push_str(if hour < 12 { "AM" } else { "PM" }),
        'F' => out.push_str(&format!("{year:04}-{:02}-{day:02}", civil.month + 1)),
        'T' => out.push_str(&format!("{hour:02}:{minute:02}:{second:02}")),
        _ => out.push('%'),
    }
}
